//! Tests of the control plane: the machine table by table, restarts, randomized histories, storage and shell.

mod actors;
mod client;
mod groups;
mod history;
mod jobs_and_keys;
mod nodes;
mod queries;
mod restarts;
mod shell;
mod storage;
mod world;
