"""Processes that meet after each rollout have one drafter, and lose no training."""

import threading

from tlt_jax.rl.adaptation import adaptation, spot_trainer


class Group:
    """Two processes, as threads."""

    def __init__(self, meetings, index):
        self._meetings, self._index = meetings, index

    def gather(self, topic, value):
        assert topic == "drafter"
        self._meetings.values[self._index] = value
        self._meetings.barrier.wait(5)
        found = list(self._meetings.values)
        self._meetings.barrier.wait(5)
        return found


class Meetings:
    def __init__(self):
        self.values, self.barrier = [None, None], threading.Barrier(2)


class Process:
    """A drafter that is the list of what was trained on."""

    def __init__(self, meetings, index):
        self.sharing = adaptation.Sharing(Group(meetings, index))
        self.report, self.version, self.weights = spot_trainer.Report(), 0, []
        self.num_asked = 0

    def train(self, *texts):
        self.weights = [*self.weights, *texts]
        self.report.num_steps += len(texts)
        self.version += 1

    def meet(self):
        def learned():
            self.num_asked += 1
            return self.weights

        shared = self.sharing.meet(self.report, self.version, learned)
        self.report, self.version, found = shared
        if found is not None:
            self.weights = found
            self.version += 1


def meet(processes):
    threads = [threading.Thread(target=process.meet) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = processes
    assert first.weights == second.weights and first.version == second.version
    assert first.report == second.report


def test_a_training_goes_on_where_that_of_another_process_ended():
    meetings = Meetings()
    first, second = processes = [Process(meetings, i) for i in range(2)]
    first.train("a", "b", "c")
    meet(processes)
    # Fewer steps than the other's, and they are not lost.
    second.train("d")
    meet(processes)
    assert first.weights == ["a", "b", "c", "d"] and first.report.num_steps == 4
    # Nobody has trained: nothing travels, and no version is new.
    version = first.version
    meet(processes)
    assert (first.num_asked, second.num_asked, first.version) == (1, 1, version)
    # A further RL step counts from nothing.
    for process in processes:
        process.report = spot_trainer.Report()
        process.sharing.begin_step()
    second.train("e")
    meet(processes)
    assert first.weights == ["a", "b", "c", "d", "e"] and first.report.num_steps == 1


def test_a_failure_of_any_process_is_told_once():
    meetings = Meetings()
    processes = [Process(meetings, i) for i in range(2)]
    processes[0].train("a")
    processes[1].report.failures.append("OSError: full")
    meet(processes)
    meet(processes)
    assert processes[0].report.failures == ["OSError: full"]
    assert processes[0].report.num_steps == 1
