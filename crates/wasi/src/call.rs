//! A single call: the generated trait on top of [`Wasi`]. Each function looks up its descriptors,
//! copies its arguments out of guest memory, and delegates; output ranges are checked before there
//! is an effect.

use crate::abi::{self, Exited, Interrupted, Result, types, wasi_snapshot_preview1 as p1};
use crate::descriptor::{Descriptor, Kind};
use crate::file::{self, Position};
use crate::function::{self, Function};
use crate::guest::{Scatter, check_range, gather, read_path, write_strings};
use crate::lock::locked;
use crate::outcome::{CallState, Outcome};
use crate::path::{Request, directory_of};
use crate::state::Wasi;
use crate::wait::Interrupt;
use crate::{directory, socket};
use std::sync::Arc;
use types::{Errno, Rights, Size};
use wiggle::{GuestError, GuestMemory, GuestPtr};

impl Wasi {
    /// Runs one function for guest thread `tid` with the raw arguments of its
    /// core signature (an `I32` in the low half). `state` is a fresh one for
    /// a new call, the same one when a call is repeated after
    /// [`Outcome::Interrupted`].
    pub fn call(
        &self,
        function: Function,
        args: &[u64],
        memory: &mut GuestMemory<'_>,
        state: &mut CallState,
        tid: u32,
        interrupt: &dyn Interrupt,
    ) -> Outcome {
        let params = function.params();
        if args.len() != params.len() {
            return Outcome::Trap(format!(
                "{} takes {} arguments, {} given",
                function.name(),
                params.len(),
                args.len()
            ));
        }
        let mut call = Call {
            wasi: self,
            state,
            tid,
            interrupt,
        };
        let outcome = match function::dispatch(function, &mut call, memory, args) {
            Ok(errno) => Outcome::Done(errno),
            Err(error) => outcome_of(&error),
        };
        if outcome != Outcome::Interrupted {
            *state = CallState::default();
        }
        outcome
    }
}

fn outcome_of(error: &wiggle::error::Error) -> Outcome {
    if error.is::<Interrupted>() {
        return Outcome::Interrupted;
    }
    if let Some(Exited(code)) = error.downcast_ref() {
        return Outcome::Exit(*code);
    }
    // An invalid flag or enum value, detected before the function started.
    if let Some(errno) = error
        .downcast_ref::<GuestError>()
        .and_then(abi::errno_of_guest)
    {
        return Outcome::Done(errno as i32);
    }
    Outcome::Trap(error.to_string())
}

pub(crate) struct Call<'a> {
    wasi: &'a Wasi,
    state: &'a mut CallState,
    tid: u32,
    interrupt: &'a dyn Interrupt,
}

/// `random_get` checks for interruption after this number of bytes (a multiple of 4).
const RANDOM_BYTES: u32 = 1 << 20;

impl Call<'_> {
    fn get(&self, fd: types::Fd) -> Result<Arc<Descriptor>> {
        locked(&self.wasi.table).get(fd.into())
    }

    fn read_at(
        &self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        iovs: types::IovecArray,
        position: Position,
    ) -> Result<Size> {
        let target = Scatter::new(memory, iovs)?;
        let descriptor = self.get(fd)?;
        let mut buffer = vec![0; target.length];
        let wasi = self.wasi;
        let count = wasi.read(&descriptor, &mut buffer, position, self.interrupt)?;
        target.write(memory, &buffer[..count])?;
        Ok(count.try_into()?)
    }
}

impl Call<'_> {
    /// Waits for the first of `count` subscriptions, in the layout of `read`; returns the number of
    /// events in `out`.
    pub(crate) fn poll(
        &mut self,
        memory: &mut GuestMemory<'_>,
        count: Size,
        out: GuestPtr<types::Event>,
        read: impl Fn(&GuestMemory<'_>, u32) -> Result<types::Subscription>,
    ) -> Result<Size> {
        if count == 0 {
            return Err(Errno::Inval.into());
        }
        if count > self.wasi.limits.subscriptions_max {
            return Err(Errno::Nomem.into());
        }
        let mut subscriptions = Vec::new();
        for number in 0..count {
            subscriptions.push(read(memory, number)?);
        }
        let events = self.wasi.poll(&subscriptions, self.state, self.interrupt)?;
        let count = u32::try_from(events.len())?;
        for (place, event) in out.as_array(count).iter().zip(events) {
            memory.write(place?, event)?;
        }
        Ok(count)
    }

    /// Writes; a call repeated while its bytes are being made durable does not write again.
    fn write(&mut self, descriptor: &Descriptor, bytes: &[u8], position: Position) -> Result<Size> {
        let count = match u32::try_from(self.state.progress_bytes)? {
            0 => self
                .wasi
                .write(descriptor, bytes, position, self.interrupt)?,
            written => written,
        };
        if let Kind::File(file) = &descriptor.kind
            && count > 0
        {
            self.state.progress_bytes = count.into();
            file.wait_durable(self.interrupt)?;
        }
        Ok(count)
    }
}

impl p1::WasiSnapshotPreview1 for Call<'_> {
    fn args_get(
        &mut self,
        memory: &mut GuestMemory<'_>,
        argv: GuestPtr<GuestPtr<u8>>,
        argv_buf: GuestPtr<u8>,
    ) -> Result<()> {
        write_strings(memory, argv, argv_buf, self.wasi.args.iter().cloned())
    }

    fn args_sizes_get(&mut self, _memory: &mut GuestMemory<'_>) -> Result<(Size, Size)> {
        let args = &self.wasi.args;
        let bytes: usize = args.iter().map(|arg| arg.len() + 1).sum();
        Ok((args.len().try_into()?, bytes.try_into()?))
    }

    fn environ_get(
        &mut self,
        memory: &mut GuestMemory<'_>,
        environ: GuestPtr<GuestPtr<u8>>,
        environ_buf: GuestPtr<u8>,
    ) -> Result<()> {
        let env = self.wasi.env.iter();
        let strings = env.map(|(name, value)| format!("{name}={value}"));
        write_strings(memory, environ, environ_buf, strings)
    }

    fn environ_sizes_get(&mut self, _memory: &mut GuestMemory<'_>) -> Result<(Size, Size)> {
        let env = &self.wasi.env;
        let bytes: usize = env.iter().map(|(n, v)| n.len() + v.len() + 2).sum();
        Ok((env.len().try_into()?, bytes.try_into()?))
    }

    fn clock_res_get(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        id: types::Clockid,
    ) -> Result<types::Timestamp> {
        match id {
            types::Clockid::Realtime | types::Clockid::Monotonic => {
                Ok(self.wasi.clock.resolution_ns())
            }
            types::Clockid::ProcessCputimeId | types::Clockid::ThreadCputimeId => {
                Err(Errno::Badf.into())
            }
        }
    }

    fn clock_time_get(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        id: types::Clockid,
        _precision: types::Timestamp,
    ) -> Result<types::Timestamp> {
        match id {
            types::Clockid::Realtime => Ok(self.wasi.clock.realtime_ns()),
            types::Clockid::Monotonic => Ok(self.wasi.clock.monotonic_ns()),
            types::Clockid::ProcessCputimeId | types::Clockid::ThreadCputimeId => {
                Err(Errno::Badf.into())
            }
        }
    }

    fn fd_advise(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        offset: types::Filesize,
        len: types::Filesize,
        advice: types::Advice,
    ) -> Result<()> {
        file::advise(&*self.get(fd)?, offset, len, advice)
    }

    fn fd_allocate(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        _offset: types::Filesize,
        _len: types::Filesize,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        file::file_of(&descriptor)?;
        descriptor.require(Rights::FD_ALLOCATE)?;
        Err(Errno::Notsup.into())
    }

    fn fd_close(&mut self, _memory: &mut GuestMemory<'_>, fd: types::Fd) -> Result<()> {
        let _namespace = self.wasi.files.shared();
        let closed = locked(&self.wasi.table).remove(fd.into())?;
        self.wasi.release(&closed);
        Ok(())
    }

    fn fd_datasync(&mut self, _memory: &mut GuestMemory<'_>, fd: types::Fd) -> Result<()> {
        let descriptor = self.get(fd)?;
        let file = file::file_of(&descriptor)?;
        descriptor.require(Rights::FD_DATASYNC)?;
        file.data.sync(true, self.interrupt)
    }

    fn fd_fdstat_get(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
    ) -> Result<types::Fdstat> {
        let descriptor = self.get(fd)?;
        let (base, inheriting) = descriptor.rights();
        Ok(types::Fdstat {
            fs_filetype: self.wasi.filetype(&descriptor.kind),
            fs_flags: descriptor.flags(),
            fs_rights_base: base,
            fs_rights_inheriting: inheriting,
        })
    }

    fn fd_fdstat_set_flags(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        flags: types::Fdflags,
    ) -> Result<()> {
        file::set_flags(&*self.get(fd)?, flags)
    }

    fn fd_fdstat_set_rights(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        fs_rights_base: Rights,
        fs_rights_inheriting: Rights,
    ) -> Result<()> {
        self.get(fd)?
            .keep_rights(fs_rights_base, fs_rights_inheriting)
    }

    fn fd_filestat_get(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
    ) -> Result<types::Filestat> {
        self.wasi.filestat(&*self.get(fd)?)
    }

    fn fd_filestat_set_size(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        size: types::Filesize,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        self.wasi.set_size(&descriptor, size, self.interrupt)
    }

    fn fd_filestat_set_times(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        atim: types::Timestamp,
        mtim: types::Timestamp,
        fst_flags: types::Fstflags,
    ) -> Result<()> {
        let times = file::timestamps(atim, mtim, fst_flags)?;
        self.wasi.set_times(&*self.get(fd)?, &times)
    }

    fn fd_pread(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        iovs: types::IovecArray,
        offset: types::Filesize,
    ) -> Result<Size> {
        self.read_at(memory, fd, iovs, Position::At(offset))
    }

    fn fd_prestat_get(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
    ) -> Result<types::Prestat> {
        let descriptor = self.get(fd)?;
        let directory = directory_of(&descriptor)?;
        let name = directory.preopened_as.as_ref().ok_or(Errno::Badf)?;
        let pr_name_len = name.len().try_into()?;
        Ok(types::Prestat::Dir(types::PrestatDir { pr_name_len }))
    }

    fn fd_prestat_dir_name(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        path: GuestPtr<u8>,
        path_len: Size,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        let directory = directory_of(&descriptor).map_err(|_| Errno::Notdir)?;
        let name = directory.preopened_as.as_ref().ok_or(Errno::Notdir)?;
        let length = u32::try_from(name.len())?;
        if length > path_len {
            return Err(Errno::Nametoolong.into());
        }
        Ok(memory.copy_from_slice(name.as_bytes(), path.as_array(length))?)
    }

    fn fd_pwrite(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        iovs: types::CiovecArray,
        offset: types::Filesize,
    ) -> Result<Size> {
        let bytes = gather(memory, iovs)?;
        let descriptor = self.get(fd)?;
        let position = Position::At(offset);
        self.write(&descriptor, &bytes, position)
    }

    fn fd_read(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        iovs: types::IovecArray,
    ) -> Result<Size> {
        self.read_at(memory, fd, iovs, Position::Current)
    }

    fn fd_readdir(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        buf: GuestPtr<u8>,
        buf_len: Size,
        cookie: types::Dircookie,
    ) -> Result<Size> {
        let descriptor = self.get(fd)?;
        let directory = directory_of(&descriptor)?;
        descriptor.require(Rights::FD_READDIR)?;
        check_range(memory, buf.as_array(buf_len))?;
        let entries_max = self.wasi.limits.directory_entries_max as usize;
        let bytes = directory::read(directory, buf_len as usize, cookie, entries_max)?;
        let length = u32::try_from(bytes.len())?;
        memory.copy_from_slice(&bytes, buf.as_array(length))?;
        Ok(length)
    }

    fn fd_renumber(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        to: types::Fd,
    ) -> Result<()> {
        let _namespace = self.wasi.files.shared();
        let replaced = locked(&self.wasi.table).renumber(fd.into(), to.into())?;
        if let Some(replaced) = replaced {
            self.wasi.release(&replaced);
        }
        Ok(())
    }

    fn fd_seek(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        offset: types::Filedelta,
        whence: types::Whence,
    ) -> Result<types::Filesize> {
        file::seek(&*self.get(fd)?, offset, whence)
    }

    fn fd_sync(&mut self, _memory: &mut GuestMemory<'_>, fd: types::Fd) -> Result<()> {
        let descriptor = self.get(fd)?;
        let file = file::file_of(&descriptor)?;
        descriptor.require(Rights::FD_SYNC)?;
        file.data.sync(false, self.interrupt)
    }

    fn fd_tell(&mut self, _memory: &mut GuestMemory<'_>, fd: types::Fd) -> Result<types::Filesize> {
        file::tell(&*self.get(fd)?)
    }

    fn fd_write(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        iovs: types::CiovecArray,
    ) -> Result<Size> {
        let bytes = gather(memory, iovs)?;
        let descriptor = self.get(fd)?;
        let position = Position::Current;
        self.write(&descriptor, &bytes, position)
    }

    fn path_create_directory(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        path: GuestPtr<str>,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        self.wasi.create_directory(&descriptor, &path)
    }

    fn path_filestat_get(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        flags: types::Lookupflags,
        path: GuestPtr<str>,
    ) -> Result<types::Filestat> {
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        self.wasi.filestat_at(&descriptor, flags, &path)
    }

    fn path_filestat_set_times(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        flags: types::Lookupflags,
        path: GuestPtr<str>,
        atim: types::Timestamp,
        mtim: types::Timestamp,
        fst_flags: types::Fstflags,
    ) -> Result<()> {
        let times = file::timestamps(atim, mtim, fst_flags)?;
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        self.wasi.set_times_at(&descriptor, flags, &path, &times)
    }

    fn path_link(
        &mut self,
        memory: &mut GuestMemory<'_>,
        old_fd: types::Fd,
        old_flags: types::Lookupflags,
        old_path: GuestPtr<str>,
        new_fd: types::Fd,
        new_path: GuestPtr<str>,
    ) -> Result<()> {
        let (source, target) = (self.get(old_fd)?, self.get(new_fd)?);
        let source_path = read_path(memory, old_path)?;
        let target_path = read_path(memory, new_path)?;
        self.wasi
            .link((&source, old_flags, &source_path), (&target, &target_path))
    }

    fn path_open(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        dirflags: types::Lookupflags,
        path: GuestPtr<str>,
        oflags: types::Oflags,
        fs_rights_base: Rights,
        _fs_rights_inheriting: Rights,
        fdflags: types::Fdflags,
    ) -> Result<types::Fd> {
        let path = read_path(memory, path)?;
        let descriptor = self.get(fd)?;
        let request = Request {
            follow: dirflags.contains(types::Lookupflags::SYMLINK_FOLLOW),
            oflags,
            rights: fs_rights_base,
            fdflags,
        };
        Ok(self.wasi.open(&descriptor, &path, request)?.into())
    }

    fn path_readlink(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        path: GuestPtr<str>,
        buf: GuestPtr<u8>,
        buf_len: Size,
    ) -> Result<Size> {
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        let mut target = self.wasi.read_link(&descriptor, &path)?;
        target.truncate(buf_len as usize);
        let length = u32::try_from(target.len())?;
        memory.copy_from_slice(&target, buf.as_array(length))?;
        Ok(length)
    }

    fn path_remove_directory(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        path: GuestPtr<str>,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        self.wasi.remove_directory_at(&descriptor, &path)
    }

    fn path_rename(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        old_path: GuestPtr<str>,
        new_fd: types::Fd,
        new_path: GuestPtr<str>,
    ) -> Result<()> {
        let (source, target) = (self.get(fd)?, self.get(new_fd)?);
        let source_path = read_path(memory, old_path)?;
        let target_path = read_path(memory, new_path)?;
        self.wasi
            .rename_at((&source, &source_path), (&target, &target_path))
    }

    fn path_symlink(
        &mut self,
        memory: &mut GuestMemory<'_>,
        old_path: GuestPtr<str>,
        fd: types::Fd,
        new_path: GuestPtr<str>,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        let contents = read_path(memory, old_path)?;
        let path = read_path(memory, new_path)?;
        self.wasi.symlink(&contents, &descriptor, &path)
    }

    fn path_unlink_file(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        path: GuestPtr<str>,
    ) -> Result<()> {
        let descriptor = self.get(fd)?;
        let path = read_path(memory, path)?;
        self.wasi.unlink(&descriptor, &path)
    }

    fn poll_oneoff(
        &mut self,
        memory: &mut GuestMemory<'_>,
        in_: GuestPtr<types::Subscription>,
        out: GuestPtr<types::Event>,
        nsubscriptions: Size,
    ) -> Result<Size> {
        self.poll(memory, nsubscriptions, out, |memory, number| {
            Ok(memory.read(in_.add(number)?)?)
        })
    }

    fn proc_exit(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        rval: types::Exitcode,
    ) -> wiggle::error::Error {
        wiggle::error::Error::from(Exited(rval))
    }

    fn proc_raise(&mut self, _memory: &mut GuestMemory<'_>, _sig: types::Signal) -> Result<()> {
        Err(Errno::Notsup.into())
    }

    fn sched_yield(&mut self, _memory: &mut GuestMemory<'_>) -> Result<()> {
        std::thread::yield_now();
        Ok(())
    }

    /// The bytes do not depend on interruptions: bytes already filled are not drawn again.
    fn random_get(
        &mut self,
        memory: &mut GuestMemory<'_>,
        buf: GuestPtr<u8>,
        buf_len: Size,
    ) -> Result<()> {
        check_range(memory, buf.as_array(buf_len))?;
        let mut done = u32::try_from(self.state.progress_bytes)?;
        while done < buf_len {
            let count = RANDOM_BYTES.min(buf_len - done);
            let mut bytes = vec![0; count as usize];
            self.wasi.random.fill(self.tid, &mut bytes);
            memory.copy_from_slice(&bytes, buf.add(done)?.as_array(count))?;
            done += count;
            self.state.progress_bytes = done.into();
            if done < buf_len && self.interrupt.requested() {
                return Err(abi::interrupted());
            }
        }
        Ok(())
    }

    fn sock_accept(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        flags: types::Fdflags,
    ) -> Result<types::Fd> {
        let descriptor = self.get(fd)?;
        let accepted = self.wasi.accept(&descriptor, flags, self.interrupt)?;
        Ok(accepted.into())
    }

    fn sock_recv(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        ri_data: types::IovecArray,
        ri_flags: types::Riflags,
    ) -> Result<(Size, types::Roflags)> {
        let descriptor = self.get(fd)?;
        let connection = socket::connection_of(&descriptor)?;
        descriptor.require(Rights::FD_READ)?;
        let target = Scatter::new(memory, ri_data)?;
        let mut buffer = vec![0; target.length];
        let count = socket::receive(connection, &mut buffer, ri_flags, self.interrupt)?;
        target.write(memory, &buffer[..count])?;
        Ok((count.try_into()?, types::Roflags::empty()))
    }

    fn sock_send(
        &mut self,
        memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        si_data: types::CiovecArray,
        si_flags: types::Siflags,
    ) -> Result<Size> {
        let descriptor = self.get(fd)?;
        let connection = socket::connection_of(&descriptor)?;
        descriptor.require(Rights::FD_WRITE)?;
        if si_flags != 0 {
            return Err(Errno::Inval.into());
        }
        let bytes = gather(memory, si_data)?;
        let count = socket::send(connection, &bytes, self.interrupt)?;
        Ok(count.try_into()?)
    }

    fn sock_shutdown(
        &mut self,
        _memory: &mut GuestMemory<'_>,
        fd: types::Fd,
        how: types::Sdflags,
    ) -> Result<()> {
        socket::shutdown(&*self.get(fd)?, how)
    }
}
