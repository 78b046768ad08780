//! The 46 functions of preview 1 by name and core signature, those of snapshot 0 that
//! differ, and the dispatch from raw arguments to wiggle's generated code.

use crate::abi::wasi_snapshot_preview1 as p1;
use crate::call::Call;
use crate::snapshot_0 as p0;
use serde::{Deserialize, Serialize};
use wiggle::GuestMemory;

/// A core WebAssembly parameter type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ParamType {
    /// 32 bits, in the low half of its `u64` argument.
    I32,
    /// 64 bits.
    I64,
}

/// A raw argument as the type that the generated code takes.
trait Argument {
    fn from_raw(raw: u64) -> Self;
}

impl Argument for i32 {
    fn from_raw(raw: u64) -> Self {
        raw as u32 as i32
    }
}

impl Argument for i64 {
    fn from_raw(raw: u64) -> Self {
        raw as i64
    }
}

macro_rules! functions {
    (
        preview 1 { $($variant:ident $name:ident ($($param:ident)*);)* }
        snapshot 0 { $($old_variant:ident $old_name:ident ($($old_param:ident)*);)* }
    ) => {
        /// A function of preview 1, or one of snapshot 0 that differs from preview 1's of
        /// that name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Function {
            $(#[doc = concat!("`", stringify!($name), "`")] $variant,)*
            $(#[doc = concat!("`", stringify!($old_name), "` of snapshot 0")] $old_variant,)*
        }

        const ALL: &[Function] = &[$(Function::$variant),*];

        impl Function {
            /// The function that a module imports as
            /// `wasi_snapshot_preview1.NAME`; `None` if preview 1 has none such.
            pub fn by_name(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($name) => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The function of snapshot 0 that is not as preview 1's of that name.
            fn of_snapshot_0(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($old_name) => Some(Self::$old_variant),)*
                    _ => None,
                }
            }

            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($name),)*
                    $(Self::$old_variant => stringify!($old_name),)*
                }
            }

            /// The parameters of the core signature.
            pub fn params(self) -> &'static [ParamType] {
                match self {
                    $(Self::$variant => &[$(ParamType::$param),*],)*
                    $(Self::$old_variant => &[$(ParamType::$old_param),*],)*
                }
            }
        }

        /// Runs `function`; the caller has checked the number of arguments.
        pub(crate) fn dispatch(
            function: Function,
            call: &mut Call<'_>,
            memory: &mut GuestMemory<'_>,
            args: &[u64],
        ) -> wiggle::error::Result<i32> {
            let mut args = args.iter().copied();
            match function {
                $(Function::$variant => functions!(
                    @run $name call memory args ($($param)*)
                ),)*
                $(Function::$old_variant => p0::$old_name(
                    call, memory, $(functions!(@arg args $old_param)),*
                ),)*
            }
        }
    };
    // The only function without a result always leaves by an error.
    (@run proc_exit $call:ident $memory:ident $args:ident ($($param:ident)*)) => {
        p1::proc_exit($call, $memory, $(functions!(@arg $args $param)),*).map(|()| 0)
    };
    (@run $name:ident $call:ident $memory:ident $args:ident ($($param:ident)*)) => {{
        let _ = &mut $args;
        p1::$name($call, $memory, $(functions!(@arg $args $param)),*)
    }};
    (@arg $args:ident I32) => { <i32 as Argument>::from_raw($args.next().unwrap_or(0)) };
    (@arg $args:ident I64) => { <i64 as Argument>::from_raw($args.next().unwrap_or(0)) };
}

functions! {
    preview 1 {
        ArgsGet args_get (I32 I32);
        ArgsSizesGet args_sizes_get (I32 I32);
        EnvironGet environ_get (I32 I32);
        EnvironSizesGet environ_sizes_get (I32 I32);
        ClockResGet clock_res_get (I32 I32);
        ClockTimeGet clock_time_get (I32 I64 I32);
        FdAdvise fd_advise (I32 I64 I64 I32);
        FdAllocate fd_allocate (I32 I64 I64);
        FdClose fd_close (I32);
        FdDatasync fd_datasync (I32);
        FdFdstatGet fd_fdstat_get (I32 I32);
        FdFdstatSetFlags fd_fdstat_set_flags (I32 I32);
        FdFdstatSetRights fd_fdstat_set_rights (I32 I64 I64);
        FdFilestatGet fd_filestat_get (I32 I32);
        FdFilestatSetSize fd_filestat_set_size (I32 I64);
        FdFilestatSetTimes fd_filestat_set_times (I32 I64 I64 I32);
        FdPread fd_pread (I32 I32 I32 I64 I32);
        FdPrestatGet fd_prestat_get (I32 I32);
        FdPrestatDirName fd_prestat_dir_name (I32 I32 I32);
        FdPwrite fd_pwrite (I32 I32 I32 I64 I32);
        FdRead fd_read (I32 I32 I32 I32);
        FdReaddir fd_readdir (I32 I32 I32 I64 I32);
        FdRenumber fd_renumber (I32 I32);
        FdSeek fd_seek (I32 I64 I32 I32);
        FdSync fd_sync (I32);
        FdTell fd_tell (I32 I32);
        FdWrite fd_write (I32 I32 I32 I32);
        PathCreateDirectory path_create_directory (I32 I32 I32);
        PathFilestatGet path_filestat_get (I32 I32 I32 I32 I32);
        PathFilestatSetTimes path_filestat_set_times (I32 I32 I32 I32 I64 I64 I32);
        PathLink path_link (I32 I32 I32 I32 I32 I32 I32);
        PathOpen path_open (I32 I32 I32 I32 I32 I64 I64 I32 I32);
        PathReadlink path_readlink (I32 I32 I32 I32 I32 I32);
        PathRemoveDirectory path_remove_directory (I32 I32 I32);
        PathRename path_rename (I32 I32 I32 I32 I32 I32);
        PathSymlink path_symlink (I32 I32 I32 I32 I32);
        PathUnlinkFile path_unlink_file (I32 I32 I32);
        PollOneoff poll_oneoff (I32 I32 I32 I32);
        ProcExit proc_exit (I32);
        ProcRaise proc_raise (I32);
        SchedYield sched_yield ();
        RandomGet random_get (I32 I32);
        SockAccept sock_accept (I32 I32 I32);
        SockRecv sock_recv (I32 I32 I32 I32 I32 I32);
        SockSend sock_send (I32 I32 I32 I32 I32);
        SockShutdown sock_shutdown (I32 I32);
    }
    snapshot 0 {
        FdSeek0 fd_seek (I32 I64 I32 I32);
        FdFilestatGet0 fd_filestat_get (I32 I32);
        PathFilestatGet0 path_filestat_get (I32 I32 I32 I32 I32);
        PollOneoff0 poll_oneoff (I32 I32 I32 I32);
    }
}

impl Function {
    /// The function that a module imports by these names: of preview 1, or of snapshot 0
    /// (`wasi_unstable`), most of which is the same. `None` if neither has it.
    pub fn by_import(module: &str, name: &str) -> Option<Self> {
        match module {
            "wasi_snapshot_preview1" => Self::by_name(name),
            "wasi_unstable" => Self::of_snapshot_0(name)
                .or_else(|| Self::by_name(name).filter(|function| *function != Self::SockAccept)),
            _ => None,
        }
    }

    /// Every function of preview 1, in the order of the witx.
    pub fn all() -> &'static [Function] {
        ALL
    }

    /// Whether the core signature returns an `i32` errno: all but `proc_exit`.
    pub fn has_result(self) -> bool {
        self != Self::ProcExit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        assert_eq!(Function::all().len(), 46);
        for &function in Function::all() {
            assert_eq!(Function::by_name(function.name()), Some(function));
            assert!(function.params().len() <= 9);
            assert_eq!(function.has_result(), function.name() != "proc_exit");
        }
        assert_eq!(Function::by_name("fd_dup"), None);
    }

    #[test]
    fn snapshot_0_is_preview_1_but_for_four() {
        let mut differ = Vec::new();
        for &function in Function::all() {
            let name = function.name();
            assert_eq!(
                Function::by_import("wasi_snapshot_preview1", name),
                Some(function)
            );
            assert_eq!(Function::by_import("wasi", name), None);
            let old = Function::by_import("wasi_unstable", name);
            if old != Some(function) {
                differ.push(name);
            }
            if let Some(old) = old {
                assert_eq!((old.name(), old.params()), (name, function.params()));
            }
        }
        let all = [
            "fd_filestat_get",
            "fd_seek",
            "path_filestat_get",
            "poll_oneoff",
            "sock_accept",
        ];
        assert_eq!(differ, all);
    }
}
