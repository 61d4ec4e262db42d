#!/usr/bin/env bash
# Checks that the tools which a build needs are there. Each that is missing gives one line that says what to install.
set -u
missing=0

say() {
    echo "error: $1" >&2
    missing=1
}

if ! command -v cc >/dev/null 2>&1; then
    say "no C compiler (cc): install gcc or clang, for example the package build-essential"
fi

if ! command -v cargo >/dev/null 2>&1 || ! command -v rustc >/dev/null 2>&1; then
    say "no Rust toolchain (cargo and rustc): install Rust 1.85 or newer, for example with rustup"
else
    version=$(rustc --version 2>/dev/null | awk '{print $2}')
    major=${version%%.*}
    rest=${version#*.}
    minor=${rest%%.*}
    if ! [ "${major:-0}" -gt 1 ] 2>/dev/null && ! [ "${minor:-0}" -ge 85 ] 2>/dev/null; then
        say "rustc is ${version:-not working}: install Rust 1.85 or newer, for example with 'rustup update stable'"
    fi
fi

python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null 2>&1; then
    say "no $python: install Python 3.11 with its venv module (or set PYTHON to one)"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
    say "$python does not run as Python 3.11: install Python 3.11 (or set PYTHON to one)"
elif ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
    say "$python lacks the modules venv and ensurepip: install them, for example the package python3.11-venv"
fi

exit "$missing"
