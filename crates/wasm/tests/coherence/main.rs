//! The pages of a machine that spans, in the order of anything that can happen: all
//! orders in small machines, orders at random in larger ones.

mod all;
mod hostile;
mod seeds;
mod world;
