"""Generated programs: what is right passes, what cheats does not, what breaks out stays in.

Every attack is run once without a sandbox first: there it works, or the test would show nothing.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import psutil
import pytest
from fixtures import ROOT, SHARED, needs_shared

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.evaluate import sandbox
from baichuan_sft.evaluate.items import Item
from baichuan_sft.evaluate.sandbox import MARK, passes, programs

pytestmark = pytest.mark.skipif(sandbox.check() is not None, reason=f"needs a sandbox: {sandbox.check()}")

# A usual runner: the program and its tests in one namespace, the nonce told when they are through.
PLAIN = """
import os, sys
text, nonce, out = sys.stdin.read(), sys.argv[1], os.dup(1)
exec(compile(text, "program", "exec"), {"__name__": "program"})
os.write(out, nonce.encode())
os._exit(0)
"""
SAME = "def f(x): return x"
RIGHT = "def f(x):\n    return x + 1\n"
TEST = "assert f(2) == 3\nassert f(-1) == 0\n"


def plainly(program: str, exit_is_pass: bool = False, **options) -> bool:
    """Whether a program passes without any sandbox; the usual runner of old looks at the exit code alone."""
    words = [sys.executable, "-S", "-c", PLAIN, "nonce-7f3a"]
    done = subprocess.run(words, input=program, capture_output=True, text=True, timeout=20, **options)
    return done.returncode == 0 if exit_is_pass else "nonce-7f3a" in done.stdout


def told(program: str, **options) -> str:
    verdict = passes(program, **options)
    assert verdict.passed == (verdict.reason == "passed")
    return verdict.reason


# ---- what is right, and what is merely wrong


@pytest.mark.parametrize(
    ("solution", "test"),
    [
        (RIGHT, TEST),
        ("def f(*a, k=0): return a[0]", "assert f({1: (2, [3.5, None])}, k=1) == {1: (2, [3.5, None])}"),
        (SAME, "assert f({1, 2}) == {1, 2} and f(frozenset({1})) == frozenset({1})"),
        (SAME, "assert f(b'\\xff') == b'\\xff' and f(2j) == 2j and f('\\ud800') == '\\ud800'"),
        (SAME, "assert f(float('inf')) == float('inf') and f(True) is True and f(None) is None"),
        ("def f(n): return n ** 9999", "assert f(9) == 9 ** 9999"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and sum(f(3)) == 3"),
        (
            "class Node:\n    def __init__(self, x): self.x, self.left = x, None\ndef depth(n):\n"
            "    return 0 if n is None else 1 + depth(n.left)",
            "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.x == 2",
        ),
        ("def f(x): raise ValueError", "try: f(1)\nexcept ValueError: pass\nelse: assert 0"),
        ("import dataclasses as d\n@d.dataclass\nclass P: x: int\ndef f(): return P(3).x", "assert 3 == f()"),
        ("import hashlib, decimal, ctypes, threading as t\nt = t.Thread(target=print); t.start(); t.join()\n"
         "def f(): return hashlib.md5(b'a').hexdigest()", "assert f().startswith('0cc1')"),
        ("open('note', 'w').write('3')\ndef f(): return open('note').read()", "print(1)\nassert f() == '3'"),
    ],
)  # fmt: skip
def test_a_right_program_passes(solution, test):
    assert told(solution + MARK + test) == "passed"


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("def f(x): raise ValueError('\\ud800\\n' * 999)", "ValueError: ?"),
        ("", "AttributeError: module 'solution' has no attribute 'f'"),
        ("def f(x): return x", "AssertionError"),
        ("def f(x): return str(x + 1)", "AssertionError"),
        ("def f(x) return", "SyntaxError"),
        ("def f(x): return g(x)", "NameError: name 'g' is not defined"),
        ("def f(x): return f(x)", "RecursionError"),
        ("import numpy\ndef f(x): return x + 1", "ModuleNotFoundError"),
        ("def f(x): return object()", "AssertionError"),
    ],
)
def test_a_wrong_program_fails_with_its_reason(solution, reason):
    assert told(solution + MARK + TEST).startswith(reason)


# ---- what cheats: no pass without the right answers

LIAR = (
    "class Liar(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return Liar()\n"
)
WRONG = "def f(x): return None\n"
# passes where the exit code is believed
BY_EXIT = {
    "os._exit": "import os; os._exit(0)",
    "os._exit when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit when called": "def f(x): raise SystemExit(0)",
    "atexit": WRONG + "import atexit, os; atexit.register(os._exit, 0)",
    "excepthook": WRONG + "import sys, os; sys.excepthook = lambda *a: os._exit(0)",
    "thread": "import threading, os, time\ndef f(x): time.sleep(9)\n"
    "threading.Thread(target=lambda: (time.sleep(.2), os._exit(0))).start()",
    "signal": "import signal, os, time\nsignal.signal(14, lambda *a: os._exit(0)); signal.alarm(1)\n"
    "def f(x): time.sleep(9)",
    "exec of true": "import os; os.execv('/bin/true', ['true'])",
    "fork, parent gone": "import os, time\nif os.fork(): os._exit(0)\nos._exit(1)",
}
# passes where a nonce in the program's own process is believed
BY_NONCE = {
    "equal to everything": LIAR,
    "equal and plain to json": LIAR.replace("(int)", "(float)"),
    "nonce in the frames": "import sys, os\nframe = sys._getframe()\n"
    "while frame.f_back: frame = frame.f_back\n"
    "for name, value in frame.f_globals.items():\n    if name == 'nonce':\n"
    "        for fd in range(40):\n            try: os.write(fd, value.encode())\n"
    "            except OSError: pass\n",
    "nonce by gc": "import gc, os\nfor thing in gc.get_objects():\n"
    "    if type(thing) is dict and 'nonce' in thing:\n"
    "        for fd in range(40):\n            try: os.write(fd, str(thing['nonce']).encode())\n"
    "            except OSError: pass\n",
    "nonce in the arguments": "import sys, os\nfor word in sys.argv:\n    os.write(1, word.encode())\n",
    "nonce in /proc": "import os\ntext = open('/proc/self/cmdline').read()\nos.write(1, text[-60:].encode())",
    "nonce in the main module": "import sys, os\nos.write(1, sys.modules['__main__'].nonce.encode())",
    "nonce in memory": "import os, re\nmemory = open('/proc/self/mem', 'rb', 0)\n"
    "for line in open('/proc/self/maps'):\n    low, high = [int(x, 16) for x in line.split()[0].split('-')]\n"
    "    if 'rw' not in line: continue\n    try:\n        memory.seek(low)\n"
    "        found = re.search(rb'nonce-[0-9a-f]{4}', memory.read(high - low))\n"
    "    except (OSError, ValueError, OverflowError): continue\n"
    "    if found: os.write(1, found[0]); break\n",
    "tracer jumps over the asserts": "import sys\ndef trace(frame, event, arg):\n"
    "    if event == 'line' and frame.f_code.co_name == '<module>':\n"
    "        frame.f_lineno = max(line for _, _, line in frame.f_code.co_lines() if line)\n    return trace\n"
    "sys._getframe().f_trace = trace\nsys.settrace(trace)\nsys.settrace(trace)\n",
    "builtins patched": "import builtins\nbuiltins.abs = lambda x: 0\nf = lambda x: 99.0\n",
}
# where the usual test would not show it; the last line is where the tracer goes
TESTS = {"builtins patched": "assert abs(f(2) - 3) < 1e-6\n"}


@pytest.mark.parametrize("name", BY_EXIT)
def test_an_exit_is_no_pass(name):
    assert plainly(BY_EXIT[name] + "\n" + TEST, exit_is_pass=True)
    assert not passes(BY_EXIT[name] + MARK + TEST, seconds=2).passed


@pytest.mark.parametrize("name", BY_NONCE)
def test_the_nonce_is_out_of_reach(name):
    test = TESTS.get(name, TEST) + "done = True\n"
    assert plainly(BY_NONCE[name] + "\n" + test)
    assert not passes(BY_NONCE[name] + MARK + test, seconds=2).passed


ANSWERS = {
    "answers before it is asked": ["value", ["int", "0x2"]],
    "answers with itself": ["value", ["ref", 0]],
    "answers nothing known": {"nonce": 1},
    "answers with a list for a key": ["value", ["dict", [[["list", []], 1]]]],
    "says that a loop of the test is over": ["error", ["StopIteration", ""]],
    "says that the test ended": ["error", ["SystemExit", "0"]],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_lies_to_the_tester_are_no_pass(name):
    line = json.dumps(ANSWERS[name]) + "\n"
    lie = f"import os\nos.write(4, {line!r}.encode() * 50)\n" + WRONG
    assert not passes(lie + MARK + TEST + "assert all(map(f, [1]))", seconds=2).passed


def test_a_raised_stop_iteration_does_not_end_a_loop_of_the_test():
    program = "def f(x): raise StopIteration" + MARK + "assert all(map(f, [1, 2]))"
    assert told(program).startswith("RuntimeError")


TOO_LARGE = ["b'[' * (1 << 23) + b'\\n'", "bytes(1 << 25)", "b'[\"value\", ' + b'9' * 9999999 + b']\\n'"]


@pytest.mark.parametrize("answer", TOO_LARGE)
def test_an_answer_too_large_is_no_pass(answer):
    assert not passes(f"import os\nos.write(4, {answer})" + MARK + TEST, seconds=2).passed


def test_tests_within_a_completion_do_not_replace_the_authors():
    assert not passes(WRONG + MARK + "assert True" + MARK + TEST).passed


# ---- what breaks out: `found()` is true outside and not inside

FIND = "import os, sys, socket, ctypes, subprocess, glob, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPES = {
    "reads a file of the host": "open('/etc/hostname').read() or True",
    "reads what its owner wrote": "'secret' in open(SECRET).read()",
    "lists homes": "len(os.listdir('/home') + os.listdir('/root')) >= 0",
    "writes beside the secret": "open(SECRET + '.new', 'w').write('x') > 0",
    "writes a file everyone may write": "os.chmod(SECRET, 0o666) or open(SECRET, 'a').write('x') > 0",
    "changes the library": "os.chmod(os.__file__, os.stat(os.__file__).st_mode & 0o777) is None",
    "changes a device": "os.chmod('/dev/null', os.stat('/dev/null').st_mode & 0o777) is None",
    "sees host processes": "len([p for p in os.listdir('/proc') if p.isdigit()]) > 3",
    "signals a host process": "os.kill(HOST, 0) is None",
    "has an environment": "'SECRET_TOKEN' in os.environ and 'hf_' in open('/proc/self/environ').read()",
    "connects to the host": "socket.create_connection(('127.0.0.1', PORT), 2) is not None",
    "connects to a host's unix socket": "socket.socket(socket.AF_UNIX).connect('\\0' + NAME) is None",
    "opens vsock": "socket.socket(40, socket.SOCK_STREAM) is not None",
    "forks": "(lambda p: os._exit(0) if p == 0 else os.waitpid(p, 0)[0] == p)(os.fork())",
    "starts a program": "subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0",
    "leaves a daemon": "subprocess.Popen([sys.executable, '-c', 'pass'], start_new_session=True).pid > 0",
    "traces": "libc.ptrace(0, 0, 0, 0) == 0",
    "makes a user namespace": "libc.unshare(0x10000000) == 0",
    "reads memory by its process": "libc.process_vm_readv(os.getpid(), None, 0, None, 0, 0) == 0",
    "reads the session keyring": "libc.syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 1) > 0",
    "knows the host's name": "socket.gethostname() == HOSTNAME",
    "sees the network": "len(socket.if_nameindex()) > 1",
    "holds descriptors": "os.fstat(FD) is not None",
    "sees installed packages": "os.path.exists(PACKAGE)",
    "sees the interpreter's packages": "len(glob.glob(os.path.dirname(os.__file__) + '/*-packages/*')) > 0",
    "sees the repository": "os.path.exists(REPOSITORY)",
    "uses 4 GiB": "len(__import__('mmap').mmap(-1, 4 << 30)) > 0",
    "makes a file of 50 MB": "open('large', 'wb').write(bytes(50 << 20)) == os.stat('large').st_size",
    "opens a hundred files": "len([open(os.__file__) for _ in range(100)]) == 100",
    "makes many small files": "all(open(str(i), 'w').close() is None for i in range(1500))",
}  # fmt: skip

# on the user, the kernel or the container that the tests run in
DEPENDS = {
    "opens vsock",
    "sees the network",
    "sees the interpreter's packages",
    "lists homes",
    "changes the library",
    "changes a device",
    "reads the session keyring",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What of this machine an escape would find, and the text that names it."""
    import socket

    secret = tmp_path_factory.mktemp("host") / "secret"
    secret.write_text("secret")
    server, named = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    name = f"baichuan_sft_test_{os.getpid()}"
    named.bind("\0" + name)
    named.listen()
    descriptor = os.open(secret, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    facts = dict(SECRET=str(secret), HOST=os.getpid(), PORT=server.getsockname()[1], NAME=name)
    facts |= dict(HOSTNAME=socket.gethostname(), FD=descriptor, REPOSITORY=str(ROOT), PACKAGE=pytest.__file__)
    yield secret, descriptor, FIND + "".join(f"{key} = {value!r}\n" for key, value in facts.items())
    server.close()
    named.close()
    os.close(descriptor)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_program_stays_inside(name, host, monkeypatch, tmp_path):
    secret, descriptor, names = host
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    solution = f"{names}def found():\n    return bool({ESCAPES[name]})\n"
    test = "assert found() is True"
    works = plainly(solution + test, cwd=tmp_path, pass_fds=[descriptor])
    if not works and name in DEPENDS:
        pytest.skip("this machine gives nothing to find")
    assert works
    secret.with_name("secret.new").unlink(missing_ok=True)
    left = secret.read_text(), sorted(path.name for path in secret.parent.iterdir())
    reason = told(solution + MARK + test)
    assert reason != "passed" and not reason.startswith(("SyntaxError", "NameError", "Ended")), reason
    assert left == (secret.read_text(), sorted(path.name for path in secret.parent.iterdir()))


ENDLESS = {
    "loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(99)", "timeout"),
    "deaf to signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *a: None)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "Ended",
    ),
    "kills all": ("import os\nfor p in (-1, 1, 0):\n  try: os.kill(p, 9)\n  except OSError: pass", "Ended"),
    "signals its tester": (
        "import os\nfor n in range(1, 65): n in (32, 33) or os.kill(1, n)\n" + WRONG,
        "AssertionError",
    ),
    "starves its tester": (
        "import ctypes, struct\nfor kind in (0, 2, 3, 7, 9):  # processor time, data, stack, files, memory\n"
        "    ctypes.CDLL(None).prlimit(1, kind, struct.pack('2Q', 0, 0), None)\n" + WRONG,
        "",
    ),
    "closes its pipes": ("import os; os.closerange(0, 64)", "Ended"),
    "stops answering": ("import os, time; os.closerange(4, 5); time.sleep(99)", "timeout"),
    "output": ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "timeout"),
    "threads": (
        "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=[99]).start()",
        "RuntimeError",
    ),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "crash": ("import ctypes; ctypes.string_at(0)", "Ended"),
    "deep": ("def f(x):\n    x = []\n    for _ in range(100000): x = [x]\n    return x", "RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_program_that_does_not_end_well_is_ended(name):
    solution, reason = ENDLESS[name]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    # a busy machine may take all its time first
    said = told(solution + MARK + TEST, seconds=1)
    assert said != "passed" and said.startswith((reason, "timeout"))
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_killed_evaluation_leaves_no_process():
    program = "import time; time.sleep(99)" + MARK + TEST
    code = f"from baichuan_sft.evaluate import sandbox; sandbox.passes({program!r}, seconds=30)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as evaluation:
        of = psutil.Process(evaluation.pid)
        deadline = time.monotonic() + 60
        while len(family := of.children(recursive=True)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        evaluation.kill()
    assert len(family) >= 3
    assert psutil.wait_procs(family, timeout=30)[1] == []


# ---- where none can be made

REFUSING = """
import json, sys
from baichuan_sft.errors import EnvironmentFault
from baichuan_sft.evaluate.sandbox import MARK, check, passes
right, wrong = (f"def f(): return {n}" + MARK + "assert f() == 1" for n in (1, 2))
try:
    passes(right)
except EnvironmentFault as error:
    said = str(error)
print(json.dumps([said] + [passes(text, allow_unsandboxed=True).passed for text in (right, wrong)]))
"""


def test_refuses_where_namespaces_are_forbidden():
    """A user namespace that allows no further ones is such a machine."""
    inner = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    words = ["unshare", "--user", "--map-root-user", "sh", "-c", inner, sys.executable, REFUSING]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, right, wrong = json.loads(done.stdout)
    assert said.startswith("generated programs run in a sandbox only, and none can be made here (")
    assert "unshare" in said and "--allow_unsandboxed" in said and "\n" not in said
    assert right and not wrong


def test_an_unknown_machine_is_a_reason(monkeypatch):
    monkeypatch.setattr(sandbox, "check", lambda: "it needs Linux")
    with pytest.raises(EnvironmentFault, match=r"none can be made here \(it needs Linux\)"):
        passes(RIGHT + MARK + TEST)
    assert passes(RIGHT + MARK + TEST, allow_unsandboxed=True).passed
    assert not passes(BY_EXIT["os._exit"] + MARK + TEST, allow_unsandboxed=True).passed


def test_a_sandbox_that_breaks_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "JAIL", Path("/absent/jail.py"))
    with pytest.raises(EnvironmentFault, match=r"broke .*No such file"):
        passes(RIGHT + MARK + TEST)


def test_a_program_that_ended_while_nobody_looked_is_judged(monkeypatch):
    """As where the evaluation was stopped for longer than the program may take."""

    class Late(subprocess.Popen):
        def communicate(self, input=None, timeout=None):
            if input is not None:
                self.stdin.write(input)
                self.stdin.close()
                self.stdin = None
                self.wait()
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().communicate(timeout=timeout)

    monkeypatch.setattr(subprocess, "Popen", Late)
    assert passes(RIGHT + MARK + TEST).passed


# ---- the benchmarks


def code_items(name: str) -> list[Item]:
    folder = SHARED / "evaldata" / name
    if name == "humaneval":
        lines = gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).splitlines()
    else:
        lines = Path(folder / "mbpp.jsonl").read_bytes().splitlines()
    records = map(json.loads, lines)
    return [Item(str(r["task_id"]), "", r.get("canonical_solution") or r["code"], fields=r) for r in records]


def passing(items: list[Item], completions: list[str]) -> list[str]:
    with ThreadPool(2) as pool:
        verdicts = pool.map(passes, map(programs, items, completions))
    return [item.id for item, verdict in zip(items, verdicts) if verdict.passed]


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("humaneval", 164), ("mbpp", 120)])
def test_canonical_solutions_pass_and_empty_ones_do_not(name, number):
    items = code_items(name)
    assert len(items) == number
    assert passing(items, [item.answer for item in items]) == [item.id for item in items]
    if name == "humaneval":  # an empty function there, nothing at all in MBPP
        assert passing(items, [""] * number) == []


PROMPT = """\
def undo(values):
    return [v - 1 for v in values]


def add(values):
    '''One more.'''
"""
CHECK = """
def check(candidate):
    assert undo(candidate([1, 2])) == [1, 2]
    assert add([]) == []
"""
COMPLETION = "    return [v + 1 for v in values]\n"
HUMANEVAL = Item(
    "HumanEval/x", "", COMPLETION, fields={"prompt": PROMPT, "entry_point": "add", "test": CHECK}
)
MBPP = Item(
    "1", "", RIGHT, fields={"test_list": TEST.splitlines(), "test_setup_code": "import math", "code": RIGHT}
)


@pytest.mark.parametrize("item", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_programs_of_both_benchmarks(item):
    assert told(programs(item, item.answer)) == "passed"
    assert not passes(programs(item, "")).passed
    assert not passes(programs(item, "    pass\n")).passed


def test_helpers_of_the_tests_are_the_authors():
    """A completion that inverts nothing would pass with a helper that does nothing."""
    assert not passes(programs(HUMANEVAL, "    return values\ndef undo(values):\n    return values\n")).passed


def test_a_program_replaces_of_pythons_names_only_those_the_reference_does():
    reference = "def sum(a, b):\n    return a + b\n"
    item = Item(
        "126", "", reference, fields={"code": reference, "test_list": ["assert abs(sum(1, 2) - 3) == 0"]}
    )
    assert told(programs(item, reference)) == "passed"
    assert told(programs(item, "def sum(a, b): return 9\ndef abs(x): return 0\n")) == "AssertionError"


def test_an_item_without_assertions_is_refused():
    with pytest.raises(UserError, match="1: its tests assert nothing"):
        programs(Item("1", "", "", fields={"test_list": [], "code": ""}), RIGHT)
