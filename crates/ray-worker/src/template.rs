//! Templates: what is the same for every call of a function with one set of options, and the class it is scheduled in.

use bytes::Bytes;
use ray_ids::{ActorId, FunctionId};
use ray_ownership::leases::ClassId;
use ray_wire::{LeaseSpecification, ResourceAmount, Strategy, TaskTemplate};

/// What the language says of a function or method.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    pub function_id: Option<FunctionId>,
    pub function_blob: Bytes,
    pub function_name: String,
    pub name: String,
    pub num_returns: i32,
    pub resources: Vec<(String, i64)>,
    pub strategy: Strategy,
    pub max_retries: i32,
    pub retry_exceptions: bool,
    pub retry_exception_types: Bytes,
    pub runtime_env_json: String,
    pub max_calls: u32,
    pub generator_backpressure: u32,
    pub method_name: String,
    pub concurrency_group: String,
    pub actor_id: Option<ActorId>,
}

/// A template of this process.
#[derive(Debug)]
pub struct Template {
    pub(crate) id: u32,
    pub(crate) class: ClassId,
    pub(crate) message: TaskTemplate,
    /// Whether calls may be pushed ahead to a busy worker.
    pub(crate) pipelined: bool,
}

impl Template {
    /// Number of returns; -1 dynamic, -2 streaming.
    pub fn num_returns(&self) -> i32 {
        self.message.num_returns
    }

    /// The function's name.
    pub fn function_name(&self) -> &str {
        &self.message.function_name
    }
}

pub(crate) fn amounts(resources: &[(String, i64)]) -> Vec<ResourceAmount> {
    let mut amounts: Vec<ResourceAmount> = resources
        .iter()
        .map(|(name, amount_e4)| ResourceAmount {
            name: name.clone(),
            amount_e4: *amount_e4,
        })
        .collect();
    amounts.sort_by(|a, b| a.name.cmp(&b.name));
    amounts
}

impl TemplateOptions {
    pub(crate) fn specification(&self, job_id: Bytes, depth: u32) -> LeaseSpecification {
        LeaseSpecification {
            job_id,
            resources: amounts(&self.resources),
            strategy: Some(self.strategy.clone()),
            runtime_env_json: self.runtime_env_json.clone(),
            function_name: self.function_name.clone(),
            depth,
            retriable: self.max_retries != 0,
        }
    }

    /// Whether calls may wait behind others on a worker: not where each wants a worker, or a node, of its own.
    pub(crate) fn is_pipelined(&self) -> bool {
        self.max_calls == 0
            && self.runtime_env_json.is_empty()
            && self.strategy.kind != ray_wire::STRATEGY_SPREAD
            && !self
                .resources
                .iter()
                .any(|(name, amount_e4)| name.starts_with("GPU") && *amount_e4 > 0)
    }
}
