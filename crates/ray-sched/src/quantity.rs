//! How much of a resource: owns the fixed point number in which every resource is counted.
//!
//! It refuses what is not a number, what is negative, and what is finer than a ten-thousandth, each by name; so that
//! sums are exact and a thousand tenths given back are exactly a hundred.
//!
//! Invariants:
//! 1. A quantity is a whole number of ten-thousandths; addition and subtraction are exact.
//! 2. A quantity made from a float is not negative and at most `Quantity::MAX`.

use crate::error::SchedError;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Neg, Sub, SubAssign};

/// An amount of a resource, in ten-thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity(i64);

impl Quantity {
    /// Ten-thousandths in one.
    pub const SCALE: i64 = 10_000;
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// One whole unit.
    pub const ONE: Self = Self(Self::SCALE);
    /// The least amount above nothing.
    pub const SMALLEST: Self = Self(1);
    /// The largest amount accepted from outside (about 115 trillion, so that 8 such sums cannot overflow).
    pub const MAX: Self = Self(i64::MAX / 8);

    /// The amount `value` of `resource`, which is named in the error.
    pub fn from_f64(resource: &str, value: f64) -> Result<Self, SchedError> {
        let resource_name = || resource.to_string();
        if !value.is_finite() {
            return Err(SchedError::NotANumber {
                resource: resource_name(),
                value,
            });
        }
        if value < 0.0 {
            return Err(SchedError::Negative {
                resource: resource_name(),
                value,
            });
        }
        if value > Self::MAX.0 as f64 / Self::SCALE as f64 {
            return Err(SchedError::TooLarge {
                resource: resource_name(),
                value,
            });
        }
        if value.fract() == 0.0 {
            // A whole float up to MAX is an exact integer, and so is its multiple.
            return Ok(Self(value as i64 * Self::SCALE));
        }
        let scaled = value * Self::SCALE as f64;
        let nearest = scaled.round();
        // Decimal fractions are not exact as floats: what is off by rounding alone is off by a few parts in 2^53.
        if (scaled - nearest).abs() > f64::EPSILON * 4.0 * scaled {
            return Err(SchedError::TooPrecise {
                resource: resource_name(),
                value,
            });
        }
        Ok(Self(nearest as i64))
    }

    /// The whole amount `value`.
    pub const fn from_int(value: u32) -> Self {
        Self(value as i64 * Self::SCALE)
    }

    /// The amount of this many ten-thousandths, as messages carry it.
    pub const fn from_raw(ten_thousandths: i64) -> Self {
        Self(ten_thousandths)
    }

    /// The number of ten-thousandths.
    pub const fn raw(self) -> i64 {
        self.0
    }

    /// The amount as a float; whole amounts are exact up to 2^53.
    pub fn to_f64(self) -> f64 {
        if self.0 % Self::SCALE == 0 {
            (self.0 / Self::SCALE) as f64
        } else {
            self.0 as f64 / Self::SCALE as f64
        }
    }

    /// Whether it is nothing.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Whether it is below nothing, as only a booked debt is.
    pub const fn is_negative(self) -> bool {
        self.0 < 0
    }

    /// Whether it has no fraction.
    pub const fn is_whole(self) -> bool {
        self.0 % Self::SCALE == 0
    }

    /// The number of whole units in it.
    pub const fn whole_units(self) -> i64 {
        self.0 / Self::SCALE
    }

    /// What is beyond the whole units.
    pub const fn fraction(self) -> Self {
        Self(self.0 % Self::SCALE)
    }

    /// This or nothing, whichever is more.
    pub fn at_least_zero(self) -> Self {
        self.max(Self::ZERO)
    }
}

impl Add for Quantity {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub for Quantity {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Neg for Quantity {
    type Output = Self;
    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl AddAssign for Quantity {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl SubAssign for Quantity {
    fn sub_assign(&mut self, other: Self) {
        self.0 -= other.0;
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sums_are_exact() {
        let tenth = Quantity::from_f64("CPU", 0.1).unwrap();
        let sum: Quantity = std::iter::repeat_n(tenth, 1_000).sum();
        assert_eq!(sum, Quantity::from_int(100));
        assert_eq!(tenth.to_f64(), 0.1);
        assert_eq!(Quantity::from_f64("memory", 8e12).unwrap().to_f64(), 8e12);
    }

    #[test]
    fn what_is_no_amount_is_refused_by_name() {
        let refuse = |value| Quantity::from_f64("CPU", value).unwrap_err().to_string();
        assert_eq!(refuse(-1.0), "CPU is -1, which is negative: give 0 or more");
        assert!(refuse(f64::NAN).contains("CPU is NaN"));
        assert!(refuse(f64::INFINITY).contains("not a finite number"));
        assert!(refuse(0.00001).contains("0.00001"));
        assert!(refuse(1.23456).contains("1.23456"));
        assert!(refuse(1000.00001).contains("1000.00001"));
        assert!(refuse(1e300).contains("too large"));
    }

    #[test]
    fn it_prints_as_people_write_it() {
        assert_eq!(Quantity::from_int(2).to_string(), "2");
        assert_eq!(Quantity::from_raw(5_000).to_string(), "0.5");
        assert_eq!(Quantity::SMALLEST.to_string(), "0.0001");
    }

    proptest! {
        #[test]
        fn every_amount_of_four_decimals_is_accepted_and_comes_back(raw in 0i64..1_000_000_000_000) {
            let quantity = Quantity::from_raw(raw);
            prop_assert_eq!(Quantity::from_f64("x", quantity.to_f64()).unwrap(), quantity);
        }
    }
}
