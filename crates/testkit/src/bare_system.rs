//! Systems for QEMU without an operating system, which boot in a moment: assembled from source
//! where they are needed.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Multiboot, 32 bits, no paging. It counts: it prints each number to the first serial line, as a
/// line, and each time increments a word in each of 256 pages, which it compares with the number
/// first: memory that was lost or is old ends the count with an `X`. Between two numbers it waits
/// until bit 22 of the time stamp counter has changed, some milliseconds. At `LAST` the power is
/// cut as ACPI does it on QEMU's q35.
const COUNT: &str = r#"
    .section .text
    .long 0x1BADB002, 0, -0x1BADB002
    .globl _start
_start:
    movl $0x80000, %esp
    xorl %ebp, %ebp
    xorl %esi, %esi
next:
    cmpl $LAST, %ebp
    je off
    movl $0x1000000, %edi
    movl $256, %ecx
page:
    cmpl %ebp, (%edi)
    jne bad
    incl (%edi)
    addl $4096, %edi
    decl %ecx
    jnz page
    movl %ebp, %eax
    call print
    incl %ebp
wait:
    rdtsc
    shrl $22, %eax
    cmpl %esi, %eax
    je wait
    movl %eax, %esi
    jmp next
print:
    movl $10, %ebx
    xorl %ecx, %ecx
digit:
    xorl %edx, %edx
    divl %ebx
    pushl %edx
    incl %ecx
    testl %eax, %eax
    jnz digit
out:
    popl %eax
    addb $'0', %al
    call put
    decl %ecx
    jnz out
    movb $10, %al
    jmp put
bad:
    movb $'X', %al
    call put
    movb $10, %al
    call put
halt:
    hlt
    jmp halt
off:
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
    jmp halt
"#;

/// Prints the byte in `%al` to the first serial line.
const PUT: &str = r#"
put:
    movb %al, %ah
    movw $0x3fd, %dx
full:
    inb %dx, %al
    testb $0x20, %al
    jz full
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    ret
"#;

/// Whether QEMU is installed; if not, says that the test is skipped.
pub fn qemu_is_installed() -> bool {
    let version = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    let is_there = version.is_ok_and(|status| status.success());
    if !is_there {
        eprintln!("skipped: no QEMU here (apt-get install qemu-system-x86)");
    }
    is_there
}

/// A system that counts, as a file to boot: for ever, or up to `last`.
///
/// # Errors
/// If it cannot be assembled.
pub fn counting_system(folder: &Path, last: Option<u32>) -> Result<Vec<u8>> {
    // One that it does not reach.
    let last = last.unwrap_or(u32::MAX);
    let system = assemble(folder, &format!("    .set LAST, {last}\n{COUNT}"))?;
    Ok(std::fs::read(system)?)
}

/// Assembles and links a system that is loaded at 1 MiB; returns its file. It may call `put`, which prints
/// the byte in `%al` to the first serial line.
///
/// # Errors
/// If it cannot be assembled.
pub fn assemble(folder: &Path, source: &str) -> Result<PathBuf> {
    let (text, system) = (folder.join("system.S"), folder.join("system"));
    std::fs::write(&text, format!("{source}{PUT}"))?;
    let status = Command::new("cc")
        .args(["-m32", "-nostdlib", "-static", "-Wl,--build-id=none"])
        .args(["-Wl,-Ttext=0x100000", "-o"])
        .args([&system, &text])
        .status()
        .context("cc")?;
    ensure!(status.success(), "the system cannot be assembled");
    Ok(system)
}
