"""Signals to a run: the first one saves, Ctrl-C after it ends at once, SIGTERM after it changes nothing."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from spatialthinker.stop_signals import STOP_SIGNALS
from tests.support.training import wait_for_ends

ROOT = Path(__file__).parents[2]
HEAD = """
import subprocess, sys, threading, time
from concurrent.futures import Future
from verl.trainer.interrupt import Interrupt, Interrupted
interrupt = Interrupt(lambda: "steps 4 to 5 are lost")
deaf = "import signal, time\\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\\nwhile True: time.sleep(1)"
child = subprocess.Popen([sys.executable, "-c", deaf])

def say(*words):
    print(*words, flush=True)

def hang_in_a_thread():
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    thread.join()
"""
HANGS = {
    "a reward": "Future().result()",
    "a save": "hang_in_a_thread()",
    "a save with a limit": "threading.Event().wait(3600)",
    "a queue": "__import__('queue').SimpleQueue().get()",
    "a process": "child.wait()",
}


class Program:
    """A program that says `ready` with the id of its child before it hangs or goes on."""

    def __init__(self, body: str):
        program = HEAD + textwrap.dedent(body)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
        self.child = psutil.Process(int(self.read("ready")))

    def read(self, word: str) -> str:
        """The rest of the next line that begins with this word."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError(self.process.stderr.read())

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        try:
            return self.process.wait(60), self.process.stderr.read()
        finally:
            self.process.kill()


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("hang", HANGS)
def test_ctrl_c_after_a_signal_ends_a_program_that_hangs_with_all_that_it_started(hang, first):
    program = Program(f"""
        with interrupt.handling_signals():
            say("ready", child.pid)
            while interrupt.signum is None:
                time.sleep(0.01)
            say("saving")
            {HANGS[hang]}
    """)
    program.send(first)
    program.read("saving")
    program.send(signal.SIGTERM)
    program.send(signal.SIGINT)
    code, words = program.end()
    assert code == -signal.SIGINT
    assert words.count("Stopping: ") == words.count("Ended at once: steps 4 to 5 are lost") == 1
    wait_for_ends([program.child])


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_however_often_ends_no_save(first):
    program = Program("""
        try:
            with interrupt.handling_signals():
                try:
                    with interrupt.interruptible():
                        say("ready", child.pid)
                        Future().result()
                except Interrupted:
                    say("saving")
                    say("saved", child.wait())
                    raise
        except Interrupted as error:
            child.kill()
            sys.exit(error.exit_code)
    """)
    program.send(first)
    program.read("saving")
    for _ in range(3):
        program.send(signal.SIGTERM)
    program.child.kill()
    program.read("saved")
    assert program.end()[0] == 128 + first


def test_a_signal_elsewhere_waits_for_the_next_place_that_may_be_left():
    program = Program("""
        with interrupt.handling_signals():
            say("ready", child.pid)
            while interrupt.signum is None:
                time.sleep(0.01)
            say("updated")
            child.kill()
            try:
                with interrupt.interruptible():
                    say("never")
            except Interrupted as error:
                sys.exit(error.exit_code)
    """)
    program.send(signal.SIGTERM)
    program.read("updated")
    assert program.end()[0] == 128 + signal.SIGTERM


def test_a_terminal_that_is_gone_stops_no_signal():
    program = Program("""
        with interrupt.handling_signals():
            say("ready", child.pid)
            while interrupt.signum is None:
                time.sleep(0.01)
            child.kill()
            sys.exit(interrupt.signum)
    """)
    program.process.stderr.close()
    program.send(signal.SIGTERM)
    assert program.process.wait(60) == signal.SIGTERM
