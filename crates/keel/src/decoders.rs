//! Decoders of the files that users give to the command line, for fuzzing.

use crate::contexts::Contexts;
use crate::{apply, high_availability, import, plan, rule, size, when};
use keel_sim::scenario::Scenario;
use keel_store::decoders::Decoder;
use std::path::Path;

fn text(name: &str, decode: fn(&[u8]) -> bool) -> Decoder {
    Decoder {
        name: name.into(),
        decode,
    }
}

fn of(bytes: &[u8], accepts: impl FnOnce(&str) -> bool) -> bool {
    std::str::from_utf8(bytes).is_ok_and(accepts)
}

/// All of them.
pub fn decoders() -> Vec<Decoder> {
    vec![
        text("machine file", |bytes| of(bytes, apply::is_file)),
        text("rule file", |bytes| of(bytes, |it| rule::parse(it).is_ok())),
        text("contexts", |bytes| {
            of(bytes, |it| Contexts::parse(it).is_ok())
        }),
        text("scenario", |bytes| {
            of(bytes, |it| {
                Scenario::parse(Path::new("scenario.toml"), it).is_ok()
            })
        }),
        text("plan", |bytes| plan::parse(bytes).is_ok()),
        text("--ha", |bytes| {
            of(bytes, |it| high_availability::parse(it).is_ok())
        }),
        text("duration", |bytes| {
            of(bytes, |it| when::duration(it).is_ok())
        }),
        text("size", |bytes| of(bytes, |it| size::parse(it).is_ok())),
        text("virtual machine of another system", |bytes| {
            of(bytes, import::is_description)
        }),
    ]
}
