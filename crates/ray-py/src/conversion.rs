//! Reading Python's dictionaries of options, and naming ids.

use bytes::Bytes;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ray_ids::IdError;
use ray_wire::{LabelCondition, Strategy};

/// A malformed id.
pub fn id_error(error: IdError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A field that may be missing or `None`.
pub fn optional<'py, T>(dict: &Bound<'py, PyDict>, key: &str) -> PyResult<Option<T>>
where
    T: FromPyObjectOwned<'py>,
{
    match dict.get_item(key)? {
        Some(value) if !value.is_none() => value.extract::<T>().map(Some).map_err(|error| {
            let error: PyErr = error.into();
            PyTypeError::new_err(format!("{key}={value:?} has the wrong type: {error}"))
        }),
        _ => Ok(None),
    }
}

/// A field with a default.
pub fn field<'py, T>(dict: &Bound<'py, PyDict>, key: &str) -> PyResult<T>
where
    T: FromPyObjectOwned<'py> + Default,
{
    Ok(optional(dict, key)?.unwrap_or_default())
}

/// Bytes of a field.
pub fn bytes_field(dict: &Bound<'_, PyDict>, key: &str) -> PyResult<Bytes> {
    Ok(optional::<Vec<u8>>(dict, key)?.map(Bytes::from).unwrap_or_default())
}

/// Amounts in ten-thousandths. Refuses what is negative or finer.
pub fn resources(dict: &Bound<'_, PyDict>, key: &str) -> PyResult<Vec<(String, i64)>> {
    let Some(amounts) = optional::<std::collections::BTreeMap<String, f64>>(dict, key)? else {
        return Ok(Vec::new());
    };
    amounts
        .into_iter()
        .map(|(name, amount)| {
            let scaled = amount * 1e4;
            if !scaled.is_finite() || scaled < 0.0 || scaled > i64::MAX as f64 / 2.0 {
                return Err(PyValueError::new_err(format!(
                    "the amount {amount} of resource {name:?} is not a quantity"
                )));
            }
            Ok((name, scaled.round() as i64))
        })
        .filter(|entry| !matches!(entry, Ok((_, 0))))
        .collect()
}

/// Conditions on labels: a list of (key, operator, values).
fn conditions(dict: &Bound<'_, PyDict>, key: &str) -> PyResult<Vec<LabelCondition>> {
    let Some(list) = optional::<Vec<(String, String, Vec<String>)>>(dict, key)? else {
        return Ok(Vec::new());
    };
    list.into_iter()
        .map(|(key, operator, values)| {
            let operator = match operator.as_str() {
                "in" => 0,
                "not_in" => 1,
                "exists" => 2,
                "does_not_exist" => 3,
                other => {
                    return Err(PyValueError::new_err(format!(
                        "{other:?} is no operator of label conditions"
                    )))
                }
            };
            Ok(LabelCondition { key, operator, values })
        })
        .collect()
}

/// A scheduling strategy.
pub fn strategy(dict: &Bound<'_, PyDict>, key: &str) -> PyResult<Strategy> {
    let Some(given) = dict.get_item(key)?.filter(|value| !value.is_none()) else {
        return Ok(Strategy::default());
    };
    let given = given.cast_into::<PyDict>()?;
    let kind = match optional::<String>(&given, "kind")?.as_deref().unwrap_or("DEFAULT") {
        "DEFAULT" => ray_wire::STRATEGY_DEFAULT,
        "SPREAD" => ray_wire::STRATEGY_SPREAD,
        "NODE_AFFINITY" => ray_wire::STRATEGY_NODE_AFFINITY,
        "NODE_LABEL" => ray_wire::STRATEGY_NODE_LABEL,
        "PLACEMENT_GROUP" => ray_wire::STRATEGY_PLACEMENT_GROUP,
        other => return Err(PyValueError::new_err(format!("{other:?} is no scheduling strategy"))),
    };
    Ok(Strategy {
        kind,
        node_id: bytes_field(&given, "node_id")?,
        soft: field(&given, "soft")?,
        spill_on_unavailable: field(&given, "spill_on_unavailable")?,
        fail_on_unavailable: field(&given, "fail_on_unavailable")?,
        hard_labels: conditions(&given, "hard")?,
        soft_labels: conditions(&given, "soft_labels")?,
        placement_group_id: bytes_field(&given, "placement_group_id")?,
        bundle_index: optional(&given, "bundle_index")?.unwrap_or(-1),
        capture_child_tasks: field(&given, "capture_child_tasks")?,
    })
}
