//! Tests of the coherence protocol under all message orders: exhaustive in small machines,
//! randomized in larger ones.

mod exhaustive;
mod hostile;
mod randomized;
mod setup;
mod simulator;
