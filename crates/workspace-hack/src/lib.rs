//! Has no code: it gives dependencies the same features in every build of the workspace, so
//! that the demo, the tests, the benches and the tasks share what was compiled of them.
//! `cargo xtask lint` says which feature is missing here.
