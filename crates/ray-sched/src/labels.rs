//! Node labels and selectors over them: owns how a selector is read, matched and printed.
//!
//! It refuses keys and values that are not label text, and selectors that no one could satisfy by their form.
//!
//! Invariants:
//! 1. A selector matches if every constraint does; the empty selector matches every node.
//! 2. `NotIn` and `DoesNotExist` match a node that lacks the key; `In` and `Exists` do not.

use crate::error::SchedError;
use std::collections::BTreeMap;
use std::fmt;

/// A node's labels.
pub type Labels = BTreeMap<String, String>;

/// What a constraint asks of a label's value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LabelOperator {
    /// The node has the key, with one of these values.
    In(Vec<String>),
    /// The node does not have the key with one of these values.
    NotIn(Vec<String>),
    /// The node has the key.
    Exists,
    /// The node does not have the key.
    DoesNotExist,
}

/// One key and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LabelConstraint {
    /// The label's key.
    pub key: String,
    /// What its value must be.
    pub operator: LabelOperator,
}

/// Constraints that a node must satisfy all of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct LabelSelector {
    /// The constraints.
    pub constraints: Vec<LabelConstraint>,
}

impl LabelConstraint {
    /// Whether `labels` satisfy it.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            LabelOperator::In(values) => value.is_some_and(|value| values.contains(value)),
            LabelOperator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            LabelOperator::Exists => value.is_some(),
            LabelOperator::DoesNotExist => value.is_none(),
        }
    }
}

impl LabelSelector {
    /// The selector that every node matches.
    pub fn any() -> Self {
        Self::default()
    }

    /// The `label_selector` option: a value is `v`, `!v`, `in(a,b)` or `!in(a,b)`.
    pub fn from_option<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, SchedError> {
        let mut selector = Self::any();
        for (key, text) in entries {
            check_key(key)?;
            let (negated, rest) = match text.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, text),
            };
            let listed = rest.strip_prefix("in(").and_then(|rest| rest.strip_suffix(')'));
            let values: Vec<String> = match listed {
                Some(list) => list.split(',').map(|value| value.trim().to_string()).collect(),
                None => vec![rest.to_string()],
            };
            for value in &values {
                check_value(key, value, listed.is_some() || negated)?;
            }
            let operator = if negated {
                LabelOperator::NotIn(values)
            } else {
                LabelOperator::In(values)
            };
            selector.constraints.push(LabelConstraint {
                key: key.to_string(),
                operator,
            });
        }
        Ok(selector)
    }

    /// This selector with one more constraint.
    pub fn with(mut self, key: &str, operator: LabelOperator) -> Self {
        self.constraints.push(LabelConstraint {
            key: key.to_string(),
            operator,
        });
        self
    }

    /// Whether `labels` satisfy every constraint.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.constraints.iter().all(|constraint| constraint.matches(labels))
    }

    /// Whether it constrains nothing.
    pub fn is_empty(&self) -> bool {
        self.constraints.is_empty()
    }
}

impl fmt::Display for LabelConstraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.operator {
            LabelOperator::In(values) => write!(f, "{} in ({})", self.key, values.join(", ")),
            LabelOperator::NotIn(values) => write!(f, "{} not in ({})", self.key, values.join(", ")),
            LabelOperator::Exists => write!(f, "{} exists", self.key),
            LabelOperator::DoesNotExist => write!(f, "{} does not exist", self.key),
        }
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, constraint) in self.constraints.iter().enumerate() {
            write!(f, "{}{constraint}", if at == 0 { "" } else { " and " })?;
        }
        Ok(())
    }
}

/// Checks a node's own labels.
pub fn check_labels(labels: &Labels) -> Result<(), SchedError> {
    for (key, value) in labels {
        check_key(key)?;
        check_value(key, value, false)?;
    }
    Ok(())
}

fn check_key(key: &str) -> Result<(), SchedError> {
    let (prefix, name) = key
        .split_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_label_text(name) || prefix.is_some_and(|prefix| prefix.is_empty() || prefix.len() > 253) {
        let problem = "a key is an optional prefix and '/', then 1 to 63 letters, digits, '-', '_' or '.', \
                       with a letter or digit at both ends";
        return Err(SchedError::BadLabel {
            key: key.to_string(),
            problem: problem.to_string(),
        });
    }
    Ok(())
}

fn check_value(key: &str, value: &str, required: bool) -> Result<(), SchedError> {
    if (value.is_empty() && !required) || is_label_text(value) {
        return Ok(());
    }
    let problem = format!(
        "the value {value:?} is not up to 63 letters, digits, '-', '_' or '.', with a letter or digit at both ends"
    );
    Err(SchedError::BadLabel {
        key: key.to_string(),
        problem,
    })
}

fn is_label_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends_well(bytes.first())
        && ends_well(bytes.last())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect()
    }

    #[test]
    fn each_operator_matches_as_named() {
        let us = labels(&[("region", "us")]);
        let none = labels(&[]);
        let matches =
            |operator: LabelOperator, labels: &Labels| LabelSelector::any().with("region", operator).matches(labels);
        let list = || vec!["us".to_string(), "eu".to_string()];
        assert!(matches(LabelOperator::In(list()), &us) && !matches(LabelOperator::In(list()), &none));
        assert!(!matches(LabelOperator::NotIn(list()), &us) && matches(LabelOperator::NotIn(list()), &none));
        assert!(matches(LabelOperator::Exists, &us) && !matches(LabelOperator::Exists, &none));
        assert!(!matches(LabelOperator::DoesNotExist, &us) && matches(LabelOperator::DoesNotExist, &none));
        assert!(LabelSelector::any().matches(&none));
    }

    #[test]
    fn the_option_is_read_in_its_four_forms() {
        let read = |text| LabelSelector::from_option([("ray.io/zone", text)]).map(|selector| selector.to_string());
        assert_eq!(read("a").unwrap(), "ray.io/zone in (a)");
        assert_eq!(read("!a").unwrap(), "ray.io/zone not in (a)");
        assert_eq!(read("in(a, b)").unwrap(), "ray.io/zone in (a, b)");
        assert_eq!(read("!in(a,b)").unwrap(), "ray.io/zone not in (a, b)");
        for wrong in ["in()", "!", "in(a", "a b", "in(a,,b)"] {
            assert!(read(wrong).is_err(), "{wrong:?} is refused");
        }
        assert!(LabelSelector::from_option([("bad key", "a")]).is_err());
        assert!(check_labels(&labels(&[("a", ""), ("x/b", "1.2")])).is_ok());
        assert!(check_labels(&labels(&[("/b", "1")])).is_err());
    }
}
