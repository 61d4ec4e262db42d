//! Tests of resources and placement through the public interface.

mod bundles;
mod common;
mod explain;
mod node_resources;
mod policy;
mod properties;
