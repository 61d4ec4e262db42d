//! The control plane's limits and periods: owns their names and defaults.
//!
//! It refuses a system config value of the wrong type by name. Names it does not know belong to other processes.

use crate::error::GcsError;
use serde_json::{Map, Value};

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident = $default:expr;)*) => {
        /// Limits and periods. Each can be set by its name in the system config.
        #[derive(Debug, Clone, PartialEq)]
        pub struct GcsSettings {
            /// The session's name, told to every node.
            pub session_name: String,
            /// What the driver gave as `_system_config`, told to every node.
            pub system_config: Map<String, Value>,
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Default for GcsSettings {
            fn default() -> Self {
                Self { session_name: String::new(), system_config: Map::new(), $($name: $default,)* }
            }
        }

        impl GcsSettings {
            /// The defaults, changed by what of `system_config` concerns the control plane.
            pub fn new(session_name: String, system_config: Map<String, Value>) -> Result<Self, GcsError> {
                let mut settings = Self { session_name, ..Self::default() };
                $(if let Some(value) = system_config.get(stringify!($name)) {
                    settings.$name = value.as_u64().ok_or_else(|| {
                        GcsError::Config(format!("{} is {value}, which is not a whole number", stringify!($name)))
                    })?;
                })*
                settings.system_config = system_config;
                Ok(settings)
            }

            /// Every number by its name.
            pub fn numbers(&self) -> Map<String, Value> {
                let mut all = Map::new();
                $(all.insert(stringify!($name).to_string(), Value::from(self.$name));)*
                all
            }
        }
    };
}

settings! {
    /// How often a silent node is asked whether it is there.
    health_check_period_ms = 3_000;
    /// After this many unanswered questions in a row a node is dead.
    health_check_failure_threshold = 5;
    /// A node whose link closed has this long to open another.
    node_link_grace_ms = 500;
    /// After a restart of the control plane a known node has this long to come back.
    node_reconnect_grace_ms = 20_000;
    /// Changes of free resources are told to nodes at most this often.
    cluster_update_period_ms = 50;
    /// A rejected actor or group is placed again after this long at first...
    placement_backoff_initial_ms = 10;
    /// ...and after this long at most.
    placement_backoff_max_ms = 1_000;
    /// What was sent to a node that does not say what it has seen counts as taken in after this long.
    placement_settle_ms = 2_000;
    /// Dead nodes that are remembered, by which their late messages are refused.
    maximum_gcs_dead_node_cached_count = 1_000;
    /// Dead actors of which the state is remembered.
    maximum_gcs_destroyed_actor_cached_count = 10_000;
    /// Ids of dead actors that are remembered after their state was dropped.
    maximum_actor_tombstones = 200_000;
    /// Finished jobs that are remembered.
    maximum_finished_jobs = 10_000;
    /// Removed placement groups that are remembered.
    maximum_removed_placement_groups = 10_000;
    /// Requests whose answers are remembered.
    maximum_remembered_requests = 50_000;
    /// Questions that may wait at once.
    maximum_waiting_questions = 100_000;
    /// Dead processes that are remembered.
    maximum_dead_processes = 20_000;
    /// The longest that a question for a key may wait.
    kv_wait_limit_ms = 600_000;
    /// The largest value of a key.
    kv_value_limit_bytes = 512 * 1024 * 1024;
    /// Actors and channels that one process may watch.
    maximum_watches_per_process = 100_000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_taken_and_a_wrong_type_is_refused_by_name() {
        let config = |text: &str| serde_json::from_str(text).expect("an object");
        let settings = GcsSettings::new("s".into(), config(r#"{"health_check_period_ms": 7, "other": "x"}"#)).unwrap();
        assert_eq!(settings.health_check_period_ms, 7);
        assert_eq!(settings.system_config["other"], "x");
        let error = GcsSettings::new("s".into(), config(r#"{"health_check_period_ms": "7"}"#)).unwrap_err();
        assert!(error.to_string().contains("health_check_period_ms"), "{error}");
    }
}
