"""``baichuan-sft doctor``: whether the hosts of a run can train together, before anything is started.

probe      runs on every host: one JSON line in, JSON lines out, gone when its input ends
facts, devices, rendezvous    what it finds out there
sessions, rounds    probes on all hosts at once, over ssh
checks     the table of checks; sameness, resources and meeting judge, and name the command that repairs
"""
