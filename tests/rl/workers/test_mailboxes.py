import threading
import time

import pytest

from tlt_jax.rl.workers import coordinator, mailboxes, records


class Clock:
    """A clock that stands unless it is set."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Trainer(threading.Thread):
    """Takes steps of a millisecond; notes who generated while it did."""

    def __init__(self, shared, generating):
        super().__init__(daemon=True)
        self.shared, self.generating = shared, generating
        self.num_steps, self.most_members, self.clashes = 0, 0, []

    def run(self):
        while not self.shared.closed:
            train = self.shared.next_training()
            if train is None:
                continue
            number = train.training
            self.shared.send(records.TrainingRuns(number, train.revision))
            while not self.shared.should_stop(number):
                self.clashes += set(train.workers) & self.generating
                self.num_steps += 1
                self.most_members = max(self.most_members, len(train.workers))
                time.sleep(0.001)
                if (more := self.shared.next_training(0)) is not None:
                    train = more
                    self.shared.send(records.TrainingRuns(number, train.revision))
            self.shared.send(records.TrainingStopped(number))


def generate(shared, command, generating, seconds, fails):
    generation, worker, round_ = command.generation, command.worker, command.round
    generating.add(worker)
    shared.send(records.WorkerAlive(generation, worker, round_))
    time.sleep(seconds)
    generating.discard(worker)
    if fails:
        shared.send(records.WorkerFailed(generation, worker, "a bug"))
    else:
        shared.send(records.WorkerDone(generation, worker, round_))


def drive(shared, generating, seconds, failing=()):
    """Run a rollout; return the commands, or raise."""
    shared.begin(range(len(seconds)))
    commands = []
    while True:
        command = shared.next_command(10)
        commands.append(command)
        match command:
            case records.Generate(worker=worker, round=round_):
                fails = worker in failing and not round_
                args = shared, command, generating, seconds[worker], fails
                threading.Thread(target=generate, args=args, daemon=True).start()
            case records.ReturnRequests(generation, worker):
                shared.send(records.RequestsReturned(generation, worker))
            case records.EndRollout():
                return commands
            case records.Abort(_, reason):
                raise RuntimeError(reason)
            case None:
                raise TimeoutError


def test_threads_generate_and_train():
    shared = mailboxes.Coordination(records.Config(min_idle=1))
    generating = set()
    trainer = Trainer(shared, generating)
    trainer.start()
    for _ in range(5):
        drive(shared, generating, [0.05, 0.001, 0.02])
        assert shared.state.training is None
        spans = shared.timeline()
        found = coordinator.sums(spans)
        assert 0 < found["workers/trained_s"] <= found["workers/idle_s"]
        assert min(i.start_s for i in spans) == 0
        assert {str(i.activity) for i in spans} >= {"busy", "training"}
    commands = drive(shared, generating, [0.03, 0.001], failing=[0])
    assert commands[-3:-1] == [records.ReturnRequests(6, 0), records.Generate(6, 1, 1)]
    with pytest.raises(RuntimeError, match="no worker is left: worker 0: a bug"):
        drive(shared, generating, [0.001], failing=[0])
    shared.close()
    trainer.join(10)
    assert not trainer.is_alive()
    assert trainer.num_steps > 5 and trainer.most_members == 2
    assert not trainer.clashes


def test_waiting_takes_in_time():
    clock = Clock()
    cfg = records.Config(heartbeat_timeout_s=60)
    shared = mailboxes.Coordination(cfg, clock)
    shared.begin([0])
    assert shared.next_command(0) == records.Generate(1, 0, 0)
    assert shared.next_command(0) is None
    clock.now_s += 61
    assert shared.next_command(0.02) is not None
    assert shared.next_command(0).reason.endswith("silent for 61 s")


def test_a_training_called_off_before_it_was_taken_does_not_show_up():
    shared = mailboxes.Coordination(records.Config())
    shared.begin([0, 1])
    shared.send(records.WorkerDone(1, 0, 0))
    shared.send(records.WorkerDone(1, 1, 0))
    commands = [shared.next_command(0) for _ in range(3)]
    assert commands[-1] == records.EndRollout(1)
    assert shared.next_training(0) is None
    # The next one is told, with its newest revision only, and once.
    shared.begin([0, 1, 2])
    shared.send(records.WorkerDone(2, 0, 0))
    shared.send(records.WorkerDone(2, 1, 0))
    assert shared.next_training(0) == records.Train(2, 1, (0, 1))
    assert shared.next_training(0) is None
    assert not shared.should_stop(2) and shared.may_publish(2)
    shared.send(records.WorkerDone(2, 2, 0))
    assert shared.should_stop(2) and shared.may_publish(2)
    shared.send(records.TrainingStopped(2))
    assert not shared.may_publish(2)


def test_a_new_rollout_drops_what_the_old_driver_has_left():
    shared = mailboxes.Coordination(records.Config())
    assert shared.begin([0]) == 1
    assert shared.begin([0, 1]) == 2
    assert shared.next_command(0) == records.Generate(2, 0, 0)


def test_commands_go_to_the_process_that_carries_them_out():
    shared = mailboxes.Coordination(records.Config())
    shared.begin([0, 1, 2], [0, 1, 1])
    assert shared.next_command(0) == records.Generate(1, 0, 0)
    for worker in (1, 2):
        assert shared.next_command(0, place=1) == records.Generate(1, worker, 0)
    shared.send(records.WorkerDone(1, 1, 0))
    assert shared.next_training(0) is None
    assert shared.next_training(0, place=1) == records.Train(1, 0, (1,))
    shared.send(records.WorkerFailed(1, 2, "died"))
    assert shared.next_command(0, place=1) is None
    assert shared.next_command(0) == records.ReturnRequests(1, 2)
    shared.send(records.RequestsReturned(1, 2))
    shared.send(records.WorkerDone(1, 0, 0))
    shared.send(records.TrainingStopped(1))
    for worker in (0, 1):
        shared.send(records.WorkerDone(1, worker, 1))
    ends = []
    for place in (0, 1):
        while (command := shared.next_command(0, place)) is not None:
            last = command
        ends.append(last)
    assert ends == [records.EndRollout(1)] * 2


def test_closing_lets_all_go():
    shared = mailboxes.Coordination(records.Config())
    shared.begin([0, 1])
    shared.send(records.WorkerDone(1, 0, 0))
    threads = [
        threading.Thread(target=wait)
        for wait in (shared.next_training, shared.next_training)
    ]
    for thread in threads:
        thread.start()
    shared.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert shared.should_stop(1) and shared.next_command() is None
