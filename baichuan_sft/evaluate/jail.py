"""The inside of the sandbox: run as a script by ``sandbox``, standard library only.

    launcher   makes the namespaces and the root, then waits
      tester   process 1 of the namespaces: runs the authors' tests, alone knows them and the nonce
        solver process 2: runs the generated program, answers the tester's calls over two pipes

The generated program shares no memory with its tests: frames, gc, descriptors, patched builtins or a tracer
show it nothing of them. Where process 1 ends, the kernel ends the rest.
"""

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress

import exchange  # beside this file

MEMORY = 1 << 30  # bytes of address space, per process
WORK = b"size=16m,nr_inodes=1000,mode=0700"
INNER_ID = 1000  # no program believes that it is root
LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = 0x7C020000  # mount uts ipc user pid net
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 1 << 14, 1 << 18, 2
RDONLY, NOSUID, NODEV = 1, 2, 4
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 0x8000, 1, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_THREAD, ALLOW, KILL, EPERM, ENOSYS = 0x10000, 0x7FFF0000, 0x80000000, 0x50001, 0x50026

# Number of a system call on each (asm/unistd.h; 9999: there is none), and the machine's audit number.
MACHINES = ("x86_64", "aarch64")
NUMBERS = """
    audit 3221225534 3221225655    clone 56 220    clone3 435 435
"""
# Nobody in a sandbox may call these. No cgroup bounds the sum of processes and root is exempt from
# RLIMIT_NPROC: there are none. vsock belongs to no network namespace: there are no sockets.
DENIED = """
    fork 57 9999    vfork 58 9999    execve 59 221    execveat 322 281
    socket 41 198    io_uring_setup 425 425    ptrace 101 117    process_vm_readv 310 270
    process_vm_writev 311 271    pidfd_getfd 438 438    kcmp 312 272    keyctl 250 219
    add_key 248 217    request_key 249 218    unshare 272 97    setns 308 268
    fsopen 430 430    mount 165 40    umount2 166 39    pivot_root 155 41
    open_tree 428 428    move_mount 429 429    mount_setattr 442 442    perf_event_open 298 241
    bpf 321 280    userfaultfd 323 282
"""


def call(name, *words):
    """A function of libc, or one of the system calls that it lacks; OSError with its name."""
    given = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    if name in ("keyctl", "open_tree", "move_mount", "mount_setattr"):
        result = LIBC.syscall(ctypes.c_long(table(DENIED)[name]), *given)
    else:
        result = getattr(LIBC, name)(*given)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def table(text):
    """Name to number, on this machine."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"system calls of {machine} are not known, only of {', '.join(MACHINES)}")
    words = text.split()
    return dict(zip(words[::3], map(int, words[1 + MACHINES.index(machine) :: 3])))


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def fix(directory, path, flags):
    """Set flags of a mount and of all below it."""
    attributes = struct.pack("4Q", flags, 0, 0, 0)
    call("mount_setattr", directory, path, AT_EMPTY_PATH | AT_RECURSIVE, attributes, len(attributes))


def mount_tmpfs(path, options):
    call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def needed():
    """Directories of the standard library and the shared libraries below it, outer ones first."""
    libraries = [os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    found: list = []
    for path in sorted({os.path.abspath(path) for path in [*sys.path, *libraries] if os.path.isdir(path)}):
        if not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


def make_namespaces():
    """A user, network, process, ipc, uts and mount namespace of our own, and no further ones in it."""
    uid, gid = os.geteuid(), os.getegid()
    call("keyctl", 1, None, 0, 0, 0)  # a new, empty session keyring
    call("unshare", NEW_NAMESPACES)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{INNER_ID} {uid} 1")
    write("/proc/self/gid_map", f"{INNER_ID} {gid} 1")
    with suppress(OSError):  # read-only in a container; the filter denies unshare too
        write("/proc/sys/user/max_user_namespaces", "0")
    call("sethostname", b"sandbox", 7)


def make_root():
    """A read-only root with the libraries, /dev/null and an empty /tmp; no /proc, where root is root."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    trees = {}
    for path in ["/dev/null", *needed()]:
        flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
        trees[path] = call("open_tree", AT_FDCWD, path.encode(), flags)
        # read-only is for /dev/null too: its owner could change the mode of the host's
        fix(trees[path], b"", RDONLY | NOSUID | (0 if path == "/dev/null" else NODEV))
    root = library = os.path.dirname(os.__file__)  # any directory that is there: all that is needed is cloned
    mount_tmpfs(root, b"size=1m,nr_inodes=1000,mode=0755")
    os.mkdir(root + "/dev")
    write(root + "/dev/null", "")
    for path, tree in trees.items():
        if path != "/dev/null":
            os.makedirs(root + path)
        call("move_mount", tree, b"", AT_FDCWD, (root + path).encode(), MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)
    os.makedirs(root + "/tmp", exist_ok=True)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(library, packages)):
            mount_tmpfs(os.path.join(library, packages), b"size=4k,mode=0555")
    fix(AT_FDCWD, b"/", RDONLY | NOSUID)
    mount_tmpfs("/tmp", WORK)
    os.chdir("/tmp")


def filter_calls():
    """No new process, program, socket, namespace or mount, nobody else's memory or keys."""
    numbers, (load, equal, reach, bits, give) = table(NUMBERS), (0x20, 0x15, 0x35, 0x45, 0x06)
    code = [(load, 0, 0, 4), (equal, 1, 0, numbers["audit"]), (give, 0, 0, KILL), (load, 0, 0, 0)]
    code += [(reach, 0, 1, 0x40000000), (give, 0, 0, EPERM)]  # the other calls of x86_64, "x32"
    for number in table(DENIED).values():
        code += [(equal, 0, 1, number), (give, 0, 0, EPERM)]
    code += [(equal, 0, 1, numbers["clone3"]), (give, 0, 0, ENOSYS)]  # libc then takes clone, its flags show
    code += [
        (equal, 0, 3, numbers["clone"]),
        (load, 0, 0, 16),
        (bits, 1, 0, CLONE_THREAD),
        (give, 0, 0, EPERM),
    ]
    code += [(give, 0, 0, ALLOW)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(code), ctypes.addressof(text)), 0, 0)


def lock(seconds):
    """Bounds, no capability, no way to get one."""
    for kind, value in {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,  # threads
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # no tracer, no reader of its memory
        filter_calls()


def main():
    """argv: "namespaces" or "none", seconds of processor time, seconds by the clock. Status 3: no sandbox."""
    inside, seconds, patience = sys.argv[1] == "namespaces", int(sys.argv[2]), int(sys.argv[3])
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 takes no signal it has no handler for
    signal.alarm(patience)  # where the evaluation is gone
    try:
        if inside:
            make_namespaces()
            make_root()
        die_with_parent()  # only now: new credentials undo it
        tester = os.fork()
    except OSError as error:
        print(error.strerror or error)
        sys.exit(3)
    if tester:
        status = os.waitstatus_to_exitcode(os.waitpid(tester, 0)[1])
        if status < 0:  # what the program answered was too much for its tests
            print(f"the tests ended by signal {-status}")
        sys.exit(max(status, 0))
    try:
        run(inside, seconds)
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(3)  # a run that comes to a verdict ends before


def die_with_parent():
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(inside, seconds):
    """In the tester: start the solver, which has neither our input nor our output, and judge it."""
    die_with_parent()
    (asked_at, ask_at), (answered_at, answer_at) = os.pipe(), os.pipe()
    verdict, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    solver = os.fork()
    if not solver:
        os.setsid()  # its process group would be the launcher's, and within its reach
        die_with_parent()
        for number, mine in enumerate((null, null, null, asked_at, answer_at)):
            os.dup2(mine, number + 20)  # first out of the way of each other
        for number in range(5):
            os.dup2(number + 20, number)
        os.closerange(5, 1 << 16)
        secure(inside, seconds)
        exchange.solve(pair(3, 4))
        os._exit(0)
    os.close(asked_at)
    os.close(answer_at)
    os.dup2(null, 1)  # tests print
    secure(inside, seconds)
    asked = json.load(sys.stdin)  # the solver never held this
    why = exchange.judge(pair(answered_at, ask_at), asked["solution"], asked["test"])
    if why and why.startswith("Ended"):
        ended = os.waitstatus_to_exitcode(os.waitpid(solver, 0)[1])
        why = "timeout" if ended == -signal.SIGXCPU else f"{why} (status {ended})"
    os.write(verdict, (why or asked["nonce"]).encode(errors="replace"))
    os._exit(0)


def pair(source, target):
    """Two pipes as one file."""
    return io.BufferedRWPair(open(source, "rb", 0), open(target, "wb", 0))


def secure(inside, seconds):
    """``lock``; outside of a sandbox as far as it goes."""
    try:
        lock(seconds)
    except (OSError, ValueError):
        if inside:
            raise


if __name__ == "__main__":
    main()
