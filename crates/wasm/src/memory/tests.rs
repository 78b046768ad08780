//! Failed growth of memories.

use super::*;
use std::cell::Cell;

const PAGE: u64 = WASM_PAGE_BYTES;

fn memory() -> GuestMemory {
    GuestMemory::new(1, Some(16), false, 1 << 30).unwrap()
}

/// Whether the kernel lets a guest access a byte.
fn is_open(memory: &GuestMemory, at: u64) -> bool {
    let address = memory.base() as u64 + at;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let bound = |text| u64::from_str_radix(text, 16).unwrap();
        (bound(start)..bound(end)).contains(&address)
    });
    line.unwrap().split(' ').nth(1).unwrap().starts_with("rw")
}

/// Writes a byte like a guest that ignores the memory's size.
fn write(memory: &GuestMemory, at: u64) {
    assert!(is_open(memory, at));
    // SAFETY: an accessible byte of the mapping, without concurrent accesses.
    unsafe { memory.base().add(at as usize).write_volatile(7) };
}

fn byte(memory: &GuestMemory, at: u64) -> u8 {
    let mut byte = [1];
    memory.read(at, &mut byte).unwrap();
    byte[0]
}

#[test]
fn what_did_not_grow_is_closed_again() {
    let memory = memory();
    let asked = Cell::new(Vec::new());
    let refused = memory.grow_with(3, |bytes| {
        asked.set([asked.take(), vec![bytes]].concat());
        if bytes > PAGE {
            write(&memory, 2 * PAGE);
        }
        false
    });
    assert_eq!(refused, None);
    assert_eq!(asked.take(), [4 * PAGE, PAGE]);
    assert_eq!(memory.size_bytes(), PAGE);
    assert!(is_open(&memory, PAGE - 1) && !is_open(&memory, PAGE));
    assert_eq!(byte(&memory, 2 * PAGE), 0);
    // Later it grows, and the new range is zero.
    assert_eq!(memory.grow_with(2, |_| true), Some(1));
    assert!(is_open(&memory, 3 * PAGE - 1) && !is_open(&memory, 3 * PAGE));
    assert_eq!(byte(&memory, 2 * PAGE), 0);
}

#[test]
fn a_member_becomes_as_small_as_it_was() {
    let memory = memory();
    memory.open_to(4 * PAGE).unwrap();
    write(&memory, 3 * PAGE);
    memory.open_to(PAGE).unwrap();
    assert_eq!(memory.size_bytes(), PAGE);
    assert!(!is_open(&memory, PAGE));
    memory.open_to(4 * PAGE).unwrap();
    assert!(is_open(&memory, 3 * PAGE));
    assert_eq!(byte(&memory, 3 * PAGE), 0);
}

/// An instance created meanwhile has seen the larger size: it may access that range, and its writes
/// there are not visible.
#[test]
fn what_an_instance_was_told_stays_open() {
    let memory = memory();
    memory.open_to(4 * PAGE).unwrap();
    memory.expose(3 * PAGE as usize);
    memory.open_to(PAGE).unwrap();
    assert!(is_open(&memory, 3 * PAGE - 1) && !is_open(&memory, 3 * PAGE));
    write(&memory, 2 * PAGE);
    memory.open_to(4 * PAGE).unwrap();
    assert_eq!(byte(&memory, 2 * PAGE), 0);
}
