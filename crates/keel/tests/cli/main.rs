//! The command line, without clusters or with small ones: programs that `keel wasm` runs
//! (`keel_wasm`), input that is refused, messages, and the description of the API.

mod bad_input;
mod doctor;
mod dry_run;
mod errors;
mod frozen_messages;
mod guests;
mod keel_wasm;
mod listeners;
mod openapi;
mod package;
mod program_arguments;
mod sim;
