//! Power models of nodes. A table holds the mean power at 0, 10, ... 100 % of load, as published
//! for SPECpower_ssj2008; the power between is interpolated linearly. A node without machines is
//! off and draws none, as in published studies of consolidation (Beloglazov and Buyya 2012).

use crate::bad_input::hint;
use serde::{Deserialize, Serialize};

/// Watts at 0, 10, ... 100 % of a node's CPU.
pub type PowerTable = [f64; 11];

/// HP ProLiant ML110 G4, Xeon 3040, 2 cores of 1860 MHz.
pub const HP_ML110_G4: PowerTable = [
    86.0, 89.4, 92.6, 96.0, 99.5, 102.0, 106.0, 108.0, 112.0, 114.0, 117.0,
];
/// HP ProLiant ML110 G5, Xeon 3075, 2 cores of 2660 MHz.
pub const HP_ML110_G5: PowerTable = [
    93.7, 97.0, 101.0, 105.0, 110.0, 116.0, 121.0, 125.0, 129.0, 133.0, 135.0,
];
const TABLES: [(&str, PowerTable); 2] =
    [("hp-ml110-g4", HP_ML110_G4), ("hp-ml110-g5", HP_ML110_G5)];

/// Power model of a node in a scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Power {
    /// The table of a named server.
    Named(String),
    /// Watts at 0, 10, ... 100 % of load.
    Watts(PowerTable),
}

impl Power {
    /// The table.
    ///
    /// # Errors
    /// A sentence, for an unknown server or an invalid power.
    pub fn table(&self) -> Result<PowerTable, String> {
        match self {
            Power::Named(name) => TABLES
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, table)| *table)
                .ok_or_else(|| {
                    let hint = hint(name, TABLES.iter().map(|(known, _)| *known));
                    format!("there is no power table {name:?}; {hint}")
                }),
            Power::Watts(watts) => match watts.iter().find(|it| !(0.0..=1e6).contains(*it)) {
                Some(invalid) => Err(format!("{invalid} W is not a valid power")),
                None => Ok(*watts),
            },
        }
    }
}

/// Power of a node with this CPU utilisation, 0 to 1.
pub fn watts(table: &PowerTable, busy: f64) -> f64 {
    let tenths = busy.clamp(0.0, 1.0) * 10.0;
    let below = (tenths as usize).min(9);
    let part = tenths - below as f64;
    table[below] + part * (table[below + 1] - table[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_numbers_it_is_a_line() {
        assert_eq!(watts(&HP_ML110_G4, 0.0), 86.0);
        assert_eq!(watts(&HP_ML110_G4, 1.0), 117.0);
        assert_eq!(watts(&HP_ML110_G5, 7.0), 135.0);
        assert!((watts(&HP_ML110_G5, 0.45) - 113.0).abs() < 1e-9);
        let error = Power::Named("hp-ml110-g6".into()).table().unwrap_err();
        assert!(error.contains("did you mean \"hp-ml110-g"), "{error}");
        let mut table = HP_ML110_G4;
        table[3] = f64::NAN;
        assert!(Power::Watts(table).table().is_err());
    }
}
