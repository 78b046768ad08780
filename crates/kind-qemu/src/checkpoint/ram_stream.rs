//! QEMU's migration stream, as far as the guest's memory is concerned: read apart into pages, and
//! put together again from them. What follows the memory is the state of the devices, which only
//! QEMU understands.
//!
//! ```text
//!   "QEVM" │ version │ 07 configuration │ 01 section "ram": its blocks │ 02 section: pages │ … │ devices
//! ```
//!
//! Numbers are big-endian. The format is that of a migration without further capabilities, as
//! QEMU 7.2 and later have it: `migration/savevm.c` (sections) and `migration/ram.c` (the flags of
//! pages) of QEMU.

use keel_machine::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// A page of the guest's memory.
pub(super) const PAGE: usize = PAGE_BYTES as usize;

const MAGIC: &[u8] = b"QEVM";
const VERSION: u32 = 3;
/// Kinds of sections.
const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;
const CONFIGURATION: u8 = 7;
/// Ends a section.
const FOOTER: u8 = 0x7e;
const RAM: &str = "ram";
/// Version of the memory's sections.
const RAM_VERSION: u32 = 4;

/// Flags in the lower bits of a page's address.
const FLAGS: u64 = PAGE_BYTES - 1;
const IS_ZERO: u64 = 0x02;
const HAS_SIZES: u64 = 0x04;
const IS_PAGE: u64 = 0x08;
const ENDS: u64 = 0x10;
/// The page is of the same block as the one before.
const IS_SAME_BLOCK: u64 = 0x20;

/// Bounds of what is read: names of machine types, blocks of memory, the state of devices.
const NAME_BYTES_MAX: u32 = 4096;
const BLOCKS_MAX: usize = 1024;
const BLOCK_BYTES_MAX: u64 = 1 << 46;
const DEVICES_BYTES_MAX: u64 = 1 << 30;

/// Why bytes are no such stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("QEMU's stream cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("QEMU's stream is of another form than is known: {0}")]
    Form(&'static str),
}

fn form<T>(what: &'static str) -> Result<T, StreamError> {
    Err(StreamError::Form(what))
}

/// A block of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Block {
    /// QEMU's name for it.
    pub(crate) name: String,
    /// A multiple of 4 KiB.
    pub(crate) bytes: u64,
}

/// How a stream begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// The machine type.
    pub(crate) machine: String,
    /// The number and the instance of the memory's section.
    section: u32,
    instance: u32,
    /// The blocks of memory.
    pub(crate) blocks: Vec<Block>,
}

impl Head {
    /// One for streams that tests make.
    #[cfg(test)]
    pub(super) fn new(machine: &str, blocks: Vec<Block>) -> Self {
        Head {
            machine: machine.into(),
            section: 2,
            instance: 0,
            blocks,
        }
    }

    /// Validates what decoding does not.
    ///
    /// # Errors
    /// [`StreamError::Form`].
    pub(super) fn check(&self) -> Result<(), StreamError> {
        if self.blocks.len() > BLOCKS_MAX {
            return form("it has too many blocks of memory");
        }
        let is_page = |block: &Block| {
            block.bytes <= BLOCK_BYTES_MAX && block.bytes.is_multiple_of(PAGE_BYTES)
        };
        match self.blocks.iter().all(is_page) {
            true => Ok(()),
            false => form("a block of memory has no whole pages"),
        }
    }
}

/// A page, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Page {
    /// Number of its block.
    pub(crate) block: usize,
    /// Where it begins there, in bytes.
    pub(crate) at: u64,
}

/// Reads a stream.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    input: R,
    head: Head,
    /// The block of the last page.
    block: Option<usize>,
    is_in_section: bool,
    /// The first byte behind the memory.
    next: Option<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the beginning.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(crate) fn begin(mut input: R) -> Result<Self, StreamError> {
        let mut magic = [0; 4];
        input.read_exact(&mut magic)?;
        if magic != MAGIC || word(&mut input)? != VERSION {
            return form("it does not begin as expected");
        }
        if byte(&mut input)? != CONFIGURATION {
            return form("it has no configuration");
        }
        let length = word(&mut input)?;
        if length > NAME_BYTES_MAX {
            return form("the name of its machine type is too long");
        }
        let machine = text(&mut input, length as usize)?;
        if byte(&mut input)? != START {
            return form("its configuration has more than a name");
        }
        let section = word(&mut input)?;
        let length = byte(&mut input)?;
        let name = text(&mut input, length.into())?;
        let (instance, version) = (word(&mut input)?, word(&mut input)?);
        if name != RAM || version != RAM_VERSION {
            return form("its first section is not the memory");
        }
        let mut head = Head {
            machine,
            section,
            instance,
            blocks: Vec::new(),
        };
        let sizes = long(&mut input)?;
        if sizes & FLAGS != HAS_SIZES {
            return form("it does not say how much memory there is");
        }
        let mut left = sizes & !FLAGS;
        while left > 0 {
            let length = byte(&mut input)?;
            let name = text(&mut input, length.into())?;
            let bytes = long(&mut input)?;
            let rest = left.checked_sub(bytes).filter(|_| bytes > 0);
            left = rest.ok_or(StreamError::Form("its blocks are larger than its memory"))?;
            head.blocks.push(Block { name, bytes });
            head.check()?;
        }
        Ok(Reader {
            input,
            head,
            block: None,
            // Up to the end of this section.
            is_in_section: true,
            next: None,
        })
    }

    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    /// Reads the next page into `page`; `None` behind the last one.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(crate) fn page(&mut self, page: &mut [u8; PAGE]) -> Result<Option<Page>, StreamError> {
        loop {
            if self.next.is_some() || !self.is_in_section && !self.enter_section()? {
                return Ok(None);
            }
            let word = long(&mut self.input)?;
            let (at, flags) = (word & !FLAGS, word & FLAGS);
            if flags == ENDS {
                self.is_in_section = false;
                if byte(&mut self.input)? != FOOTER
                    || self::word(&mut self.input)? != self.head.section
                {
                    return form("a section does not end as expected");
                }
                continue;
            }
            if flags & IS_SAME_BLOCK == 0 {
                let length = byte(&mut self.input)?;
                let name = text(&mut self.input, length.into())?;
                let mut blocks = self.head.blocks.iter();
                self.block = blocks.position(|block| block.name == name);
            }
            let Some((block, known)) = self
                .block
                .and_then(|number| Some((number, self.head.blocks.get(number)?)))
            else {
                return form("it has a page of an unknown block");
            };
            if at >= known.bytes {
                return form("it has a page outside of its block");
            }
            match flags & !IS_SAME_BLOCK {
                IS_PAGE => self.input.read_exact(page)?,
                IS_ZERO => page.fill(byte(&mut self.input)?),
                _ => return form("it has a page in an unknown form"),
            }
            return Ok(Some(Page { block, at }));
        }
    }

    /// Whether a further section of the memory begins.
    fn enter_section(&mut self) -> Result<bool, StreamError> {
        let kind = byte(&mut self.input)?;
        if !matches!(kind, PART | END) {
            self.next = Some(kind);
            return Ok(false);
        }
        if word(&mut self.input)? != self.head.section {
            return form("it has a section that is sent in parts, beside the memory");
        }
        self.is_in_section = true;
        Ok(true)
    }

    /// The state of the devices, once all pages were read.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(crate) fn devices(self) -> Result<Vec<u8>, StreamError> {
        let Some(first) = self.next else {
            return form("it ends in the middle of the memory");
        };
        let mut devices = vec![first];
        let mut rest = self.input.take(DEVICES_BYTES_MAX);
        rest.read_to_end(&mut devices)?;
        match devices.len() as u64 > DEVICES_BYTES_MAX {
            true => form("its devices have too much state"),
            false => Ok(devices),
        }
    }
}

/// Whether bytes are a whole stream.
pub(crate) fn is_memory_stream(bytes: &[u8]) -> bool {
    let read = || {
        let mut reader = Reader::begin(bytes)?;
        let mut page = [0; PAGE];
        while reader.page(&mut page)?.is_some() {}
        reader.devices()
    };
    let devices: Result<Vec<u8>, StreamError> = read();
    devices.is_ok()
}

fn byte(input: &mut impl Read) -> io::Result<u8> {
    let mut bytes = [0];
    input.read_exact(&mut bytes)?;
    Ok(bytes[0])
}

fn word(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn long(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn text(input: &mut impl Read, length: usize) -> Result<String, StreamError> {
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes)?;
    String::from_utf8(bytes).or_else(|_| form("a name is no text"))
}

/// Writes a stream that QEMU reads.
#[derive(Debug)]
pub(crate) struct Writer<'a, W> {
    output: W,
    head: &'a Head,
    /// The block of the last page.
    block: Option<usize>,
}

impl<'a, W: Write> Writer<'a, W> {
    /// Writes the beginning.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(crate) fn begin(mut output: W, head: &'a Head) -> Result<Self, StreamError> {
        head.check()?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_be_bytes());
        bytes.push(CONFIGURATION);
        bytes.extend((head.machine.len() as u32).to_be_bytes());
        bytes.extend(head.machine.as_bytes());
        bytes.push(START);
        bytes.extend(head.section.to_be_bytes());
        put_name(&mut bytes, RAM)?;
        bytes.extend(head.instance.to_be_bytes());
        bytes.extend(RAM_VERSION.to_be_bytes());
        let total: u64 = head.blocks.iter().map(|block| block.bytes).sum();
        bytes.extend((total | HAS_SIZES).to_be_bytes());
        for block in &head.blocks {
            put_name(&mut bytes, &block.name)?;
            bytes.extend(block.bytes.to_be_bytes());
        }
        put_end(&mut bytes, head.section);
        // The section of all pages.
        bytes.push(PART);
        bytes.extend(head.section.to_be_bytes());
        output.write_all(&bytes)?;
        Ok(Writer {
            output,
            head,
            block: None,
        })
    }

    /// Writes pages of one block.
    ///
    /// # Errors
    /// [`StreamError`], also for pages that no block has.
    pub(crate) fn pages(&mut self, block: usize, at: u64, pages: &[u8]) -> Result<(), StreamError> {
        let Some(known) = self.head.blocks.get(block) else {
            return form("it has a page of an unknown block");
        };
        let end = at.checked_add(pages.len() as u64);
        if !at.is_multiple_of(PAGE_BYTES) || end.is_none_or(|end| end > known.bytes) {
            return form("it has a page outside of its block");
        }
        let mut bytes = Vec::with_capacity(pages.len() + pages.len() / PAGE * 8 + 256);
        for (page, at) in pages.chunks_exact(PAGE).zip((at..).step_by(PAGE)) {
            let is_same = self.block == Some(block);
            let flags = IS_PAGE | if is_same { IS_SAME_BLOCK } else { 0 };
            bytes.extend((at | flags).to_be_bytes());
            if !is_same {
                put_name(&mut bytes, &known.name)?;
                self.block = Some(block);
            }
            bytes.extend(page);
        }
        Ok(self.output.write_all(&bytes)?)
    }

    /// Writes the state of the devices, which ends the stream.
    ///
    /// # Errors
    /// [`StreamError`].
    pub(crate) fn finish(mut self, devices: &[u8]) -> Result<(), StreamError> {
        let mut bytes = Vec::new();
        put_end(&mut bytes, self.head.section);
        self.output.write_all(&bytes)?;
        self.output.write_all(devices)?;
        Ok(self.output.flush()?)
    }
}

fn put_name(bytes: &mut Vec<u8>, name: &str) -> Result<(), StreamError> {
    let length = u8::try_from(name.len()).or_else(|_| form("a name is too long"))?;
    bytes.push(length);
    bytes.extend(name.as_bytes());
    Ok(())
}

fn put_end(bytes: &mut Vec<u8>, section: u32) {
    bytes.extend(ENDS.to_be_bytes());
    bytes.push(FOOTER);
    bytes.extend(section.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        let block = |name: &str, pages: u64| Block {
            name: name.into(),
            bytes: pages * PAGE_BYTES,
        };
        Head::new("pc-q35-7.2", vec![block("pc.ram", 16), block("pc.bios", 2)])
    }

    /// A stream of three pages.
    fn stream() -> Vec<u8> {
        let (mut bytes, head) = (Vec::new(), head());
        let mut writer = Writer::begin(&mut bytes, &head).unwrap();
        let two = [[7; PAGE], [8; PAGE]].concat();
        writer.pages(0, 4 * PAGE_BYTES, &two).unwrap();
        writer.pages(1, PAGE_BYTES, &[9; PAGE]).unwrap();
        writer.finish(b"\x04devices").unwrap();
        bytes
    }

    /// Pages, by their first byte.
    type Pages = Vec<(Page, u8)>;

    fn read(bytes: &[u8]) -> Result<(Pages, Vec<u8>), StreamError> {
        let mut reader = Reader::begin(bytes)?;
        assert_eq!(*reader.head(), head());
        let (mut pages, mut page) = (Vec::new(), [0; PAGE]);
        while let Some(found) = reader.page(&mut page)? {
            assert!(page.iter().all(|byte| *byte == page[0]));
            pages.push((found, page[0]));
        }
        Ok((pages, reader.devices()?))
    }

    #[test]
    fn what_was_written_is_read() {
        let page = |block, number: u64, byte| {
            let at = number * PAGE_BYTES;
            (Page { block, at }, byte)
        };
        let (pages, devices) = read(&stream()).unwrap();
        assert_eq!(pages, [page(0, 4, 7), page(0, 5, 8), page(1, 1, 9)]);
        assert_eq!(devices, b"\x04devices");
    }

    #[test]
    fn pages_of_one_byte_are_short() {
        let (mut bytes, head) = (Vec::new(), head());
        let writer = Writer::begin(&mut bytes, &head).unwrap();
        writer.finish(b"\x04").unwrap();
        // In the section of pages, in front of its end and the devices.
        let at = bytes.len() - 14;
        let mut zero = ((3 * PAGE_BYTES) | IS_ZERO).to_be_bytes().to_vec();
        zero.extend(b"\x06pc.ram\0");
        bytes.splice(at..at, zero);
        let found = Page {
            block: 0,
            at: 3 * PAGE_BYTES,
        };
        assert_eq!(read(&bytes).unwrap().0, [(found, 0)]);
    }

    #[test]
    fn a_part_of_a_stream_is_none() {
        let all = stream();
        let devices = all.len() - b"\x04devices".len();
        for cut in (0..devices).step_by(7).chain(devices - 20..=devices) {
            assert!(read(&all[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn other_forms_are_refused() {
        let refused = |at: usize, byte: u8| {
            let mut bytes = stream();
            bytes[at] = byte;
            match read(&bytes) {
                Err(StreamError::Form(what)) => what,
                other => panic!("{other:?}"),
            }
        };
        assert!(refused(0, b'q').contains("begin"));
        assert!(refused(7, 4).contains("begin"));
        assert!(refused(8, START).contains("configuration"));
        assert!(refused(9, 1).contains("too long"));
        let ram = stream().windows(3).position(|it| it == b"ram").unwrap();
        assert!(refused(ram, b'R').contains("not the memory"));
        // The least byte of the total, which has the flags.
        assert!(refused(ram + 3 + 8 + 7, 8).contains("how much memory"));
        let name = stream().windows(6).rposition(|it| it == b"pc.ram").unwrap();
        assert!(refused(name, b'P').contains("unknown block"));
        // The flags of that page, and its address.
        assert!(refused(name - 2, 0x40).contains("unknown form"));
        assert!(refused(name - 4, 1).contains("outside"));
    }

    #[test]
    fn pages_that_no_block_has_are_not_written() {
        let head = head();
        let mut writer = Writer::begin(Vec::new(), &head).unwrap();
        assert!(writer.pages(2, 0, &[0; PAGE]).is_err());
        assert!(writer.pages(1, 2 * PAGE_BYTES, &[0; PAGE]).is_err());
        assert!(writer.pages(1, 5, &[0; PAGE]).is_err());
        assert!(writer.pages(0, u64::MAX - 4095, &[0; PAGE]).is_err());
    }
}
