//! The machine's memory as objects, with the guest's names for them: reports, and moves to a part.
//! How pages are found and moved is left to [`crate::span`].

use super::super::wasm_worker::WasmWorker;
use super::{OBJECT_PATIENCE, failed};
use crate::control::{MoveObject, ObjectReport};
use crate::span::{Heat, Object, Pages};
use keel_net::RpcError;
use keel_wasm::coherence::{PartId, PartSet};
use keel_wasm::memory::{GuestMemory, MemoryError, PAGE_BYTES};
use keel_wasm::runtime::NamedRange;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Names reported for a page of several objects, at most.
const NAMES_MAX: usize = 8;

impl WasmWorker {
    /// The machine's memory as objects, by holders and by the guest's names.
    pub(in crate::worker) fn objects(&self) -> Result<Vec<ObjectReport>, RpcError> {
        let (machine, pages) = {
            let inner = self.inner();
            (inner.machine.clone(), inner.parts.pages())
        };
        let machine = machine.ok_or_else(|| failed("no machine runs here"))?;
        let objects = match pages {
            Some(pages) => pages
                .objects()
                .map_err(|error| self.failed_naming_silent(error))?,
            None => objects_on_one_node(machine.memories()).map_err(failed)?,
        };
        let named = machine.named();
        let named = named_pages(&named);
        let mut reports = Vec::new();
        for object in objects {
            let of = if object.memory == 0 { &named[..] } else { &[] };
            let all = object.range.end - object.range.start;
            for (range, name) in split(&object.range, of) {
                let bytes = range.end - range.start;
                reports.push(ObjectReport {
                    name: name.map(str::to_owned),
                    memory: object.memory,
                    start: range.start,
                    bytes,
                    owner: object.owner,
                    readers: object.readers,
                    // Distributed over the object's pages, because it is known only in
                    // total.
                    exchanges: (u128::from(object.exchanges) * u128::from(bytes)
                        / u128::from(all.max(1))) as u64,
                    directory: object.directory,
                });
            }
        }
        Ok(reports)
    }

    /// Recent use of its memory; empty while it has one part.
    pub(in crate::worker) fn heat(&self) -> Result<Heat, RpcError> {
        let pages = self.inner().parts.pages();
        let heat = pages.map(|pages| pages.heat()).transpose();
        heat.map(Option::unwrap_or_default).map_err(failed)
    }

    /// Moves an object to a part; returns the bytes that have arrived.
    pub(in crate::worker) fn move_object(&self, object: MoveObject) -> Result<u64, RpcError> {
        let end = object.start.checked_add(object.bytes);
        let end = end.ok_or_else(|| failed("the range is outside of any memory"))?;
        self.pages()?
            .move_object(object.memory, object.start..end, object.to, OBJECT_PATIENCE)
            .map_err(|error| self.failed_naming_silent(error))
    }

    pub(super) fn pages(&self) -> Result<Arc<Pages>, RpcError> {
        let pages = self.inner().parts.pages();
        pages.ok_or_else(|| failed("the machine is on one node (`keel span`)"))
    }
}

/// The memory of a machine with one part, as objects.
fn objects_on_one_node(memories: &[Arc<GuestMemory>]) -> Result<Vec<Object>, MemoryError> {
    let mut objects = Vec::new();
    for (number, memory) in (0..).zip(memories) {
        let here = memory.populated()?.into_iter();
        objects.extend(here.map(|range| Object {
            memory: number,
            range,
            owner: PartId::HOME,
            readers: PartSet::default(),
            exchanges: 0,
            directory: PartId::HOME,
        }));
    }
    Ok(objects)
}

/// Page ranges of named objects in rising order, split where one begins or ends, each
/// with its names: a page with several objects has the names of all.
fn named_pages(named: &BTreeMap<String, NamedRange>) -> Vec<(Range<u64>, String)> {
    let mut begins: Vec<_> = named
        .iter()
        .map(|(name, piece)| {
            let start = piece.start / PAGE_BYTES * PAGE_BYTES;
            let end = piece.start.saturating_add(piece.bytes);
            (
                start,
                Reverse(end.next_multiple_of(PAGE_BYTES)),
                name.as_str(),
            )
        })
        .collect();
    begins.sort_unstable();
    let bounds = begins.iter().flat_map(|(start, end, _)| [*start, end.0]);
    let bounds: BTreeSet<u64> = bounds.collect();
    let mut begins = begins.into_iter().peekable();
    let mut here: BTreeSet<(u64, Reverse<u64>, &str)> = BTreeSet::new();
    // The same objects, by their ends.
    let mut ends = BTreeSet::new();
    let mut pages: Vec<(Range<u64>, String)> = Vec::new();
    for (start, end) in bounds.iter().zip(bounds.iter().skip(1)) {
        while let Some((_, ended)) = ends.first().filter(|(end, _)| end <= start).copied() {
            ends.pop_first();
            here.remove(&ended);
        }
        while let Some(begun) = begins.next_if(|it| it.0 == *start) {
            here.insert(begun);
            ends.insert((begun.1.0, begun));
        }
        let mut names: Vec<&str> = here.iter().rev().map(|it| it.2).take(NAMES_MAX).collect();
        names.reverse();
        if !names.is_empty() {
            pages.push((*start..*end, names.join(",")));
        }
    }
    pages
}

/// Splits a range where names begin and end.
fn split<'a>(
    range: &Range<u64>,
    named: &'a [(Range<u64>, String)],
) -> Vec<(Range<u64>, Option<&'a str>)> {
    let (mut at, mut pieces) = (range.start, Vec::new());
    let first = named.partition_point(|(piece, _)| piece.end <= range.start);
    let mut rest = named.iter().skip(first);
    while let Some((piece, name)) = rest.next().filter(|(piece, _)| piece.start < range.end) {
        let (start, end) = (piece.start.max(at), piece.end.min(range.end));
        if start >= end {
            continue;
        }
        if at < start {
            pieces.push((at..start, None));
        }
        pieces.push((start..end, Some(name.as_str())));
        at = end;
    }
    if at < range.end {
        pieces.push((at..range.end, None));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_split_where_names_begin_and_end() {
        let piece = |start: u64, bytes: u64| NamedRange { start, bytes };
        let page = |number: u64| number * PAGE_BYTES;
        let named = BTreeMap::from([
            ("a".to_owned(), piece(page(2) + 7, 10)),
            // The second begins in the page of the first and contains a third.
            ("b".to_owned(), piece(page(2) + 100, page(3))),
            ("c".to_owned(), piece(page(4), 1)),
            ("d".to_owned(), piece(page(8), page(2))),
        ]);
        let named = named_pages(&named);
        let told: Vec<_> = named
            .iter()
            .map(|(range, names)| {
                let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
                (pages, names.as_str())
            })
            .collect();
        assert_eq!(
            told,
            [
                (2..3, "b,a"),
                (3..4, "b"),
                (4..5, "b,c"),
                (5..6, "b"),
                (8..10, "d")
            ]
        );
        let cut = |first: u64, last: u64| -> Vec<(u64, u64, &str)> {
            let pieces = split(&(page(first)..page(last)), &named);
            let pieces = pieces.into_iter().map(|(range, name)| {
                let (first, last) = (range.start / PAGE_BYTES, range.end / PAGE_BYTES);
                (first, last, name.unwrap_or("-"))
            });
            pieces.collect()
        };
        assert_eq!(cut(0, 2), [(0, 2, "-")]);
        assert_eq!(cut(4, 5), [(4, 5, "b,c")]);
        assert_eq!(
            cut(0, 9),
            [
                (0, 2, "-"),
                (2, 3, "b,a"),
                (3, 4, "b"),
                (4, 5, "b,c"),
                (5, 6, "b"),
                (6, 8, "-"),
                (8, 9, "d")
            ]
        );
        assert_eq!(cut(9, 12), [(9, 10, "d"), (10, 12, "-")]);
    }

    /// The maximum number of nested objects: the names of a page are limited to the
    /// innermost.
    #[test]
    fn names_of_nested_objects_are_limited() {
        let piece = |number: u64| NamedRange {
            start: number * PAGE_BYTES,
            bytes: (8192 - 2 * number) * PAGE_BYTES,
        };
        let named = (0..4096).map(|number| (format!("n{number:04}"), piece(number)));
        let named = named_pages(&named.collect());
        assert_eq!(named.len(), 8191);
        assert_eq!(named[0].1, "n0000");
        assert_eq!(
            named[4095].1,
            "n4088,n4089,n4090,n4091,n4092,n4093,n4094,n4095"
        );
    }
}
