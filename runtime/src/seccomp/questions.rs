//! The questions of a filter whose action is SCMP_ACT_NOTIFY, answered with "not permitted" and written down (seccomp(2),
//! "seccomp_user_notif", Linux 5.0).
//!
//! Whoever asked waits for the answer. Nothing here looks at memory of the process that asks: what it points to may be changed
//! by the time that the kernel would, so it says nothing that could be relied on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::calls;

/// `struct seccomp_data`.
#[repr(C)]
#[derive(Copy, Clone)]
struct Data {
    number: i32,
    arch: u32,
    instruction: u64,
    args: [u64; 6],
}

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Copy, Clone)]
struct Question {
    id: u64,
    pid: u32,
    flags: u32,
    data: Data,
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

// linux/seccomp.h: _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, struct seccomp_notif_resp)
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;

/// Answers one question, and says what it was; `None` when whoever asked is gone. To be called when there is one.
pub(crate) fn refuse(listener: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let data = Data { number: 0, arch: 0, instruction: 0, args: [0; 6] };
    let mut question = Question { id: 0, pid: 0, flags: 0, data };
    // SAFETY: the kernel writes one seccomp_notif, which must be zero before, and which lives for the whole call.
    if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, &mut question) } < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOENT | libc::EINTR) => Ok(None),
            _ => Err(error),
        };
    }
    let mut answer = Answer { id: question.id, value: 0, error: -libc::EPERM, flags: 0 };
    // SAFETY: the kernel reads one seccomp_notif_resp, which lives for the whole call.
    if unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, &mut answer) } < 0 {
        let error = io::Error::last_os_error();
        // It was killed meanwhile.
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
    }
    let Data { number, args, .. } = question.data;
    let name = calls::name(number as u32).map_or_else(|| format!("call {number}"), str::to_owned);
    let args: Vec<String> = args.iter().map(|arg| format!("{arg:#x}")).collect();
    Ok(Some(format!("process {} {name}({}) refused\n", question.pid, args.join(", "))))
}
