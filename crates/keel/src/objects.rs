//! `keel objects`: a machine's memory, object by object in a chosen order, or in total for each of
//! its parts.

use crate::cluster::Reach;
use crate::output::{self, Format};
use anyhow::Result;
use keel_api::ObjectInfo;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct ObjectsArgs {
    /// The machine.
    machine: String,
    /// Sort order: by address, or by the most of something.
    #[arg(long, value_enum, default_value_t = By::Address)]
    by: By,
    /// The most objects.
    #[arg(long, value_name = "COUNT")]
    top: Option<usize>,
    /// Shows the totals of each part instead.
    #[arg(long, conflicts_with_all = ["by", "top"])]
    summary: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum By {
    Address,
    Bytes,
    Exchanges,
    Waits,
    Shared,
    Idle,
}

impl By {
    fn sort(self, objects: &mut [ObjectInfo]) {
        let most = |object: &ObjectInfo| match self {
            // In the order of the answer.
            By::Address => 0,
            By::Bytes => object.bytes,
            By::Exchanges => object.exchanges,
            By::Waits => object.waits,
            By::Shared => object.shared_pages.into(),
            By::Idle => object.idle_bytes,
        };
        objects.sort_by_key(|object| Reverse(most(object)));
    }
}

/// The totals of a part.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Summary {
    part: u32,
    node: String,
    pieces: usize,
    bytes: u64,
    exchanges: u64,
    waits: u64,
    shared_pages: u32,
    falsely_shared_pages: u32,
    idle_bytes: u64,
}

impl Summary {
    fn add(&mut self, object: &ObjectInfo) {
        self.pieces += 1;
        self.bytes = self.bytes.saturating_add(object.bytes);
        self.exchanges = self.exchanges.saturating_add(object.exchanges);
        self.waits = self.waits.saturating_add(object.waits);
        self.shared_pages = self.shared_pages.saturating_add(object.shared_pages);
        self.falsely_shared_pages = self
            .falsely_shared_pages
            .saturating_add(object.falsely_shared_pages);
        self.idle_bytes = self.idle_bytes.saturating_add(object.idle_bytes);
    }
}

/// The totals of each part that holds an object, by its number.
fn summary(objects: &[ObjectInfo]) -> Vec<Summary> {
    let mut parts: BTreeMap<u32, Summary> = BTreeMap::new();
    for object in objects {
        let of = parts.entry(object.part).or_insert_with(|| Summary {
            part: object.part,
            node: object.node.clone(),
            ..Summary::default()
        });
        of.add(object);
    }
    parts.into_values().collect()
}

/// Shared pages, and how many of them are falsely shared.
fn shared(pages: u32, falsely: u32) -> String {
    match (pages, falsely) {
        (0, _) => "-".into(),
        (pages, 0) => pages.to_string(),
        (pages, falsely) => format!("{pages}, {falsely} falsely"),
    }
}

pub(crate) async fn run(reach: &Reach, args: &ObjectsArgs) -> Result<ExitCode> {
    let path = keel_api::path(["machines", &args.machine, "objects"]);
    let mut objects: Vec<ObjectInfo> = reach.client()?.get(&path).await?;
    if args.summary {
        show_summary(reach.format(), &summary(&objects))?;
        return Ok(ExitCode::SUCCESS);
    }
    args.by.sort(&mut objects);
    let more = objects.split_off(args.top.unwrap_or(usize::MAX).min(objects.len()));
    show(reach.format(), &objects)?;
    if !more.is_empty() && reach.format() == Format::Text {
        let bytes = more.iter().map(|object| object.bytes).sum();
        let (count, bytes) = (more.len(), output::bytes(bytes));
        eprintln!("and {count} more, of {bytes}");
    }
    Ok(ExitCode::SUCCESS)
}

fn show_summary(format: Format, parts: &[Summary]) -> Result<()> {
    output::list(
        format,
        parts,
        &[
            "part",
            "node",
            "pieces",
            "bytes",
            "exchanges",
            "waits",
            "shared pages",
            "idle",
        ],
        |of| of.part.to_string(),
        |of| {
            vec![
                of.part.to_string(),
                of.node.clone(),
                of.pieces.to_string(),
                output::bytes(of.bytes),
                of.exchanges.to_string(),
                of.waits.to_string(),
                shared(of.shared_pages, of.falsely_shared_pages),
                output::bytes(of.idle_bytes),
            ]
        },
    )
}

fn show(format: Format, objects: &[ObjectInfo]) -> Result<()> {
    output::list(
        format,
        objects,
        &[
            "object",
            "name",
            "bytes",
            "node",
            "part",
            "readers",
            "exchanges",
            "waits",
            "shared pages",
            "idle",
            "directory",
        ],
        |object| object.range.clone(),
        |object| {
            vec![
                object.range.clone(),
                object.name.clone().unwrap_or_else(|| "-".into()),
                output::bytes(object.bytes),
                object.node.clone(),
                object.part.to_string(),
                object.readers.join(","),
                object.exchanges.to_string(),
                object.waits.to_string(),
                shared(object.shared_pages, object.falsely_shared_pages),
                output::bytes(object.idle_bytes),
                object.directory.clone(),
            ]
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(start: u64, part: u32, bytes: u64, waits: u64, falsely: u32) -> ObjectInfo {
        ObjectInfo {
            range: keel_api::object_range_name(0, start, bytes),
            name: None,
            bytes,
            part,
            node: format!("n{part}"),
            readers: Vec::new(),
            exchanges: 2 * waits,
            waits,
            shared_pages: falsely + 1,
            falsely_shared_pages: falsely,
            idle_bytes: bytes / 2,
            directory: "n0".into(),
        }
    }

    fn objects() -> Vec<ObjectInfo> {
        vec![
            object(0, 0, 4096, 5, 0),
            object(4096, 2, 8192, 9, 1),
            object(12288, 0, 65536, 5, 2),
            object(77824, 1, 4096, 0, 0),
        ]
    }

    #[test]
    fn most_of_something_comes_first_and_equals_stay_as_they_are() {
        let order = |by: By| -> Vec<u64> {
            let mut objects = objects();
            by.sort(&mut objects);
            let start = |it: &ObjectInfo| keel_api::object_range(&it.range).map(|it| it.1);
            objects.iter().filter_map(start).collect()
        };
        assert_eq!(order(By::Address), [0, 4096, 12288, 77824]);
        assert_eq!(order(By::Bytes), [12288, 4096, 0, 77824]);
        assert_eq!(order(By::Waits), [4096, 0, 12288, 77824]);
        assert_eq!(order(By::Exchanges), order(By::Waits));
        assert_eq!(order(By::Shared), [12288, 4096, 0, 77824]);
        assert_eq!(order(By::Idle), order(By::Bytes));
    }

    #[test]
    fn parts_have_what_their_pieces_have() {
        let of = |part: u32, pieces, bytes, waits, (shared_pages, falsely_shared_pages)| Summary {
            part,
            node: format!("n{part}"),
            pieces,
            bytes,
            exchanges: 2 * waits,
            waits,
            shared_pages,
            falsely_shared_pages,
            idle_bytes: bytes / 2,
        };
        let expected = [
            of(0, 2, 69632, 10, (4, 2)),
            of(1, 1, 4096, 0, (1, 0)),
            of(2, 1, 8192, 9, (2, 1)),
        ];
        assert_eq!(summary(&objects()), expected);
        assert_eq!(summary(&[]), []);
        assert_eq!(shared(0, 0), "-");
        assert_eq!(shared(3, 0), "3");
        assert_eq!(shared(3, 2), "3, 2 falsely");
    }
}
