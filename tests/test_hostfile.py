"""Every fault of a hostfile is named with its line before anything starts."""

import pytest
from fixtures import ROOT

from baichuan_sft.errors import UserError
from baichuan_sft.hosts import Host, read_hostfile, ssh_words

GOOD = {
    "plain": ("a slots=2", [Host("a", 2, 1)]),
    "two": ("a slots=2\nb slots=1", [Host("a", 2, 1), Host("b", 1, 2)]),
    "byte_order_mark": ("\ufeffa slots=2", [Host("a", 2, 1)]),
    "crlf": ("a slots=2\r\nb slots=2\r\n", [Host("a", 2, 1), Host("b", 2, 2)]),
    "comments": ("# hosts\n\n  a slots=2 # the first\nb slots=1 #x", [Host("a", 2, 3), Host("b", 1, 4)]),
    "tabs": ("a\t slots=2", [Host("a", 2, 1)]),
    "ipv4": ("10.0.0.1 slots=2", [Host("10.0.0.1", 2, 1)]),
    "ipv6": ("fd00::1 slots=2", [Host("fd00::1", 2, 1)]),
    "dotted": ("gpu-1.rack_2.example.com slots=8", [Host("gpu-1.rack_2.example.com", 8, 1)]),
    "fields": (
        "a slots=2 port=2222 user=me python=/v/bin/python workdir=/w",
        [Host("a", 2, 1, port=2222, user="me", python="/v/bin/python", workdir="/w")],
    ),
}

# name -> (the file, what the message says)
BAD = {
    "template": ("[master address] slots=8", ":1: [master address]: this is the template; put a host name"),
    "ipv6_brackets": ("[fd00::1] slots=8", ":1: [fd00::1]: write an IPv6 address without brackets"),
    "no_slots_wanted": ("a slots=0", ":1: slots=0: needs a whole number from 1 to 256"),
    "duplicate": ("a slots=2\nb slots=2\nA slots=4", ":3: A is the host of line 1 again"),
    "duplicate_address": ("fd00::1 slots=2\nfd00:0::1 slots=2", ":2: fd00:0::1 is the host of line 1 again"),
    "this_machine_twice": (
        "127.0.0.1 slots=1\nlocalhost slots=1",
        ":2: localhost is the host of line 1",
    ),
    "digits_and_more": ("a slots=8x", ":1: slots=8x: needs a whole number"),
    "negative": ("a slots=-1", ":1: slots=-1: needs a whole number"),
    "word": ("a slots=abc", ":1: slots=abc: needs a whole number"),
    "blanks": ("a slots = 8", ":1: 'a slots = 8' has blanks around '='; write it as: worker-1 slots=8"),
    "blank_after": ("a slots= 8", ":1: 'slots=' has no value; write it as: worker-1 slots=8, without blanks"),
    "capitals": ("a SLOTS=2", ":1: unknown field 'SLOTS=2', did you mean 'slots'?"),
    "max_slots": ("a max_slots=4 slots=2", ":1: unknown field 'max_slots=4', did you mean 'slots'?"),
    "no_slots": ("a", ":1: 'a' needs slots=NUMBER right after the host name"),
    "slots_later": ("a port=22 slots=2", ":1: 'a port=22 slots=2' needs slots=NUMBER right after"),
    "slots_twice": ("a slots=2 slots=3", ":1: slots= stands twice"),
    "command": ("a;reboot slots=1", ":1: 'a;reboot' is no host name"),
    "substitution": ("$(reboot) slots=1", ":1: '$(reboot)' is no host name"),
    "option": ("-oProxyCommand=x slots=1", ":1: host '-oProxyCommand=x' starts with '-'"),
    "user_as_option": ("a slots=1 user=-oProxyCommand=x", ":1: user=-oProxyCommand=x: is no user name"),
    "absurd": ("a slots=99999999", ":1: slots=99999999: needs a whole number from 1 to 256"),
    "full_width": ("a slots=２", ":1: slots=２: needs a whole number"),
    "full_width_host": ("ａ slots=2", ":1: 'ａ' is no host name"),
    "bad_address": ("10.0.0.256 slots=2", ":1: '10.0.0.256' is no IP address"),
    "zone": ("fe80::1%eth0 slots=2", ":1: 'fe80::1%eth0' is no host name"),
    "user_at": ("me@a slots=2", ":1: host 'me@a': write the user as a field: a slots=8 user=me"),
    "port_in_name": ("a:22 slots=2", ":1: host 'a:22': write the port as a field: a slots=8 port=22"),
    "bad_port": ("a slots=2 port=70000", ":1: port=70000: needs a whole number from 1 to 65535"),
    "relative": ("a slots=2 workdir=w", ":1: 'w' must be an absolute path"),
    "unknown": ("a slots=2 gpus=0,1", ":1: unknown field 'gpus=0,1'"),
    "empty": ("", ": names no host"),
    "comments_only": ("# a slots=2\n", ": names no host"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_lines(name, tmp_path):
    text, expected = GOOD[name]
    path = tmp_path / "hostfile"
    path.write_text(text, newline="")
    assert read_hostfile(path) == expected


@pytest.mark.parametrize("name", BAD)
def test_faults_are_named_with_their_line(name, tmp_path):
    text, expected = BAD[name]
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}{expected}")
    assert caught.value.exit_code == 2


def test_all_faults_at_once(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("a slots=0\nb slots=2\n\nb slots=2\nc;x slots=1\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    lines = [text.removeprefix(f"{path}:").split(":")[0] for text in str(caught.value).splitlines()]
    assert lines == ["1", "4", "5"]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"--hostfile nowhere: no such file; .* this machine alone"):
        read_hostfile("nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path)
    path = tmp_path / "hostfile"
    path.write_bytes("a slots=1".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16"):
        read_hostfile(path)
    path.write_bytes(b"a slots=1\n\xff slots=1")
    with pytest.raises(UserError, match=r":2: is not UTF-8"):
        read_hostfile(path)


def test_deepspeed_reads_the_same_lines():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = ROOT / "hostfile.example"
    hosts = read_hostfile(path)
    assert hosts
    assert runner.fetch_hostfile(str(path)) == {host.name: host.slots for host in hosts}
    text = [text for name, (text, _) in GOOD.items() if name == "fields"]
    assert runner._parse_hostfile(text) == {"a": 2}


def test_ssh_gets_a_quoted_command_after_its_options():
    words = ssh_words(Host("a", 1, port=2222, user="me"), ["echo", "x; reboot", "$HOME"])
    assert words[0] == "ssh" and words[-3:-1] == ["--", "a"]
    assert words[-1] == "echo 'x; reboot' '$HOME'"
    assert [words[words.index("-p") + 1], words[words.index("-l") + 1]] == ["2222", "me"]
    assert "BatchMode=yes" in words and not any("HostKey" in word for word in words)
