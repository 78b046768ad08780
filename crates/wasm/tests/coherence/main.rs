//! The pages of a machine that spans, in the order of anything that can happen: all
//! orders in small machines, orders at random in larger ones.

mod exhaustive;
mod hostile;
mod randomized;
mod simulator;
