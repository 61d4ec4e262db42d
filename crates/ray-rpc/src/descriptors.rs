//! How many files this process may open: raises the limit where it may, and says what to do where it is reached.
//!
//! It refuses to go beyond the hard limit, which only an administrator can raise.
//!
//! Invariant: 1. The limit is never lowered.

use std::io;

use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

/// More is of no use, and programs exist that close every number up to the limit.
const ENOUGH: u64 = 1 << 18;

/// Raises the soft limit of open files towards the hard one: each process that this one is linked to takes a descriptor.
/// Returns what holds now.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let soft = limit.current.unwrap_or(u64::MAX);
    let wanted = limit.maximum.unwrap_or(u64::MAX).min(ENOUGH);
    if soft >= wanted {
        return soft;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => wanted,
        Err(_) => soft,
    }
}

/// For an error that says that a limit of descriptors or threads was reached: which, and what helps. Else empty.
pub(crate) fn remedy(error: &io::Error) -> String {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::MFILE) => {
            let limit = getrlimit(Resource::Nofile);
            let text = |value: Option<u64>| value.map_or_else(|| "unlimited".to_string(), |value| value.to_string());
            format!(
                " (this process has reached its limit of open files, RLIMIT_NOFILE, soft {} and hard {}; each process that \
                 it talks to takes one. Raise it, for example by `ulimit -n 65536`, LimitNOFILE= or docker's --ulimit \
                 nofile)",
                text(limit.current),
                text(limit.maximum)
            )
        }
        Some(rustix::io::Errno::NFILE) => {
            " (the machine has reached its limit of open files; raise it by `sysctl fs.file-max`)".to_string()
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_the_hard_one_and_never_lowered() {
        let before = getrlimit(Resource::Nofile);
        let now = raise_descriptor_limit();
        assert!(now >= before.current.unwrap_or(u64::MAX).min(ENOUGH));
        assert_eq!(raise_descriptor_limit(), now);
        assert_eq!(getrlimit(Resource::Nofile).maximum, before.maximum);
    }

    #[test]
    fn an_error_of_the_limit_names_it_and_the_remedy() {
        let text = remedy(&io::Error::from_raw_os_error(rustix::io::Errno::MFILE.raw_os_error()));
        assert!(text.contains("RLIMIT_NOFILE") && text.contains("ulimit -n"), "{text}");
        assert_eq!(
            remedy(&io::Error::from_raw_os_error(rustix::io::Errno::NOENT.raw_os_error())),
            ""
        );
    }
}
