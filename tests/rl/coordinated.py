"""A small world around the coordinator: workers, a trainer, a network that loses.

Everything that happens is drawn from one seed. The world knows the truth (who really
generates, which step really runs) and checks the coordinator's laws against it.
"""

import random

from tlt_jax.rl.workers import coordinator, records

CFG = records.Config(
    min_idle=1, heartbeat_timeout_s=30, stop_timeout_s=25, resend_s=4, max_restarts=1
)
MAX_TICKS = 3000


class Network:
    """Delivers messages late, twice, in another order, or not at all."""

    def __init__(self, rng: random.Random, loss: float):
        self._rng, self._loss, self._sent = rng, loss, []

    def send(self, now: int, message) -> None:
        if self._rng.random() < self._loss:
            return
        copies = 1 + (self._rng.random() < self._loss)
        for _ in range(copies):
            delay = self._rng.choice((0, 0, 1, 2, 9)) if self._loss else 0
            self._sent.append((now + delay, message))

    def arrived(self, now: int) -> list:
        due = [m for at, m in self._sent if at <= now]
        self._sent = [(at, m) for at, m in self._sent if at > now]
        if self._loss:
            self._rng.shuffle(due)
        return due


class Queue:
    """The shared queue of requests; who holds what."""

    def __init__(self, generation: int, num_requests: int):
        self.generation = generation
        self.waiting = list(range(num_requests))
        self.held: dict[int, tuple[int, int]] = {}
        self.done: set[int] = set()
        # The last round of each lost worker.
        self._returned: dict[int, int] = {}
        self.all = set(self.waiting)

    def take(self, generation: int, worker: int, round_: int) -> int | None:
        is_lost = round_ <= self._returned.get(worker, -1)
        if generation != self.generation or is_lost:
            return None
        if not self.waiting:
            return None
        request = self.waiting.pop()
        self.held[request] = worker, round_
        return request

    def finish(self, generation: int, request: int) -> None:
        if generation == self.generation:
            self.done.add(request)
            self.held.pop(request, None)

    def give_back(self, generation: int, worker: int, round_: int) -> None:
        if generation == self.generation:
            self._returned[worker] = max(round_, self._returned.get(worker, -1))
            held = self.held.items()
            mine = [r for r, (w, turn) in held if w == worker and turn <= round_]
            self.waiting += mine
            for request in mine:
                del self.held[request]


class Generator:
    """A worker: takes requests one by one, says at each tick what is so."""

    def __init__(self, number: int, rng: random.Random):
        self.number, self._rng = number, rng
        self.told = (0, -1)
        self.generating = False
        self.request = None
        self.left = 0
        self.dead = False
        self.hangs = 0

    def hear(self, message) -> None:
        if isinstance(message, records.Generate) and message.worker == self.number:
            pair = (message.generation, message.round)
            if pair > self.told and not self.dead:
                self.told, self.generating, self.request = pair, True, None

    def tick(self, queue: Queue) -> object | None:
        if self.dead or self.told[0] == 0:
            return None
        if self.hangs:
            self.hangs -= 1
            return None
        generation, round_ = self.told
        if self.generating:
            if self.request is None:
                self.request = queue.take(generation, self.number, round_)
                self.left = self._rng.choice((1, 2, 3, 12))
                self.generating = self.request is not None
            else:
                self.left -= 1
                if self.left <= 0:
                    queue.finish(generation, self.request)
                    self.request = None
        kind = records.WorkerAlive if self.generating else records.WorkerDone
        return kind(generation, self.number, round_)


class Trainer:
    """Takes steps as long as it may; repeats what it said last."""

    def __init__(self, rng: random.Random, fault: float):
        self._rng, self._fault = rng, fault
        self.current: records.Train | None = None
        self.over = 0
        self.last: object | None = None
        self.step_left = 0

    def hear(self, message) -> object | None:
        match message:
            case records.Train(number, revision, _) if number > self.over:
                now = (-1, -1)
                if self.current is not None:
                    now = (self.current.training, self.current.revision)
                if (number, revision) > now:
                    self.current = message
            case records.Stop(number):
                self.over = max(self.over, number)
                if self.current is None or self.current.training != number:
                    return records.TrainingStopped(number)
        return None

    def tick(self, may_train) -> object | None:
        """Say what is so; `may_train` is None where the answer was lost."""
        if self.step_left:
            self.step_left -= 1
            return None
        if self.current is None:
            return self.last
        number = self.current.training
        if self._rng.random() < self._fault:
            self.last = records.TrainingFailed(number, "loss is not finite")
        elif number <= self.over or may_train is False:
            self.last = records.TrainingStopped(number)
        else:
            if may_train:
                self.step_left = self._rng.choice((1, 2, 3))
                if self._rng.random() < self._fault:
                    self.step_left = self._rng.choice((60, 10**9))
            return records.TrainingRuns(number, self.current.revision)
        self.over, self.current = max(self.over, number), None
        return self.last


class World:
    """Runs rollouts one after another and checks the laws at every tick."""

    def __init__(self, seed: int, machine=coordinator, *, faults=True, cfg=CFG):
        rng = self.rng = random.Random(seed)
        self.machine, self.cfg = machine, cfg
        self.loss = rng.choice((0.0, 0.1, 0.4)) if faults else 0.0
        self.fault = rng.choice((0.0, 0.03, 0.1)) if faults else 0.0
        self.network = Network(rng, self.loss)
        self.state = records.State()
        self.workers = {n: Generator(n, rng) for n in range(rng.randint(1, 4))}
        # The simulation has one trainer, wherever its workers are.
        self.num_places = rng.choice((1, 1, 2)) if faults else 1
        self.trainer = Trainer(rng, self.fault)
        self.now = 0
        self.queue = Queue(0, 0)
        self.over: set[object] = set()
        self.num_steps = 0
        self.given_up: set[int] = set()
        self.num_failures = 0
        # Chance that somebody comes in a tick of a rollout, and who has.
        self.comes = 0.0
        self.come: set[int] = set()
        self.num_joined = 0

    def run(self, num_rollouts: int = 3) -> None:
        for generation in range(1, num_rollouts + 1):
            living = [n for n, w in self.workers.items() if not w.dead]
            if not living:
                return
            chosen = self.rng.sample(living, self.rng.randint(1, len(living)))
            self.roll(generation, chosen, self.rng.randint(0, 6))

    def run_with_newcomers(self, num_rollouts: int = 3) -> int:
        """Start the dead anew, now and then, and let others come that were not there.

        What a rollout has left that was given up or lost all its workers, the next one
        does. Returns how many it took.
        """
        generation, left, num_whole = 0, 0, 0
        while num_whole < num_rollouts:
            generation += 1
            assert generation < 60, "rollouts come to nothing"
            for number, worker in list(self.workers.items()):
                if worker.dead and self.rng.random() < 0.5:
                    self.workers[number] = Generator(number, self.rng)
            living = [n for n, w in self.workers.items() if not w.dead]
            if not living or self.rng.random() < 0.3:
                living.append(max(self.workers) + self.rng.randint(1, 3))
                self.workers[living[-1]] = Generator(living[-1], self.rng)
            chosen = self.rng.sample(living, self.rng.randint(1, len(living)))
            self.roll(generation, chosen, left or self.rng.randint(1, 6))
            left = len(self.queue.all - self.queue.done)
            num_whole += not left
        return generation

    def roll(self, generation: int, chosen: list[int], num_requests: int) -> None:
        """Make one rollout, which may be given up."""
        places = tuple(n % self.num_places for n in chosen)
        asked = records.RolloutAsked(generation, tuple(chosen), places)
        self.queue = Queue(generation, num_requests)
        self.over = set()
        self.num_failures = 0
        self.come = set()
        began = self.now
        while not self.over:
            assert self.now - began < MAX_TICKS, "the rollout does not end"
            self.network.send(self.now, asked)
            self.tick(chosen)
            early = self.now - began < 20
            if early and self.rng.random() < self.fault / 5:
                break  # The driver gives the rollout up.
        else:
            self.check_end(generation, chosen)

    def tick(self, chosen) -> None:
        self.now += 1
        self.break_something(chosen)
        for message in self.network.arrived(self.now):
            self.deliver(message)
        self.give(records.Tick())
        for worker in self.workers.values():
            self.say(worker.tick(self.queue))
        self.let_come()
        self.trainer_tick()

    def let_come(self) -> None:
        """Let the lost come anew, and others late: they say so until they are asked."""
        generation = self.queue.generation
        if self.rng.random() < self.comes:
            lost = self.state.which(records.Activity.LOST)
            number = max(self.workers) + 1
            if lost and self.rng.random() < 0.7:
                number = self.rng.choice(lost)
            if number not in self.come and len(self.workers) < 8:
                self.workers[number] = Generator(number, self.rng)
                self.come.add(number)
        self.come = {n for n in self.come if not self.workers[n].dead}
        for number in sorted(self.come):
            known = self.state.worker(number)
            is_lost = known is not None and known.activity == records.Activity.LOST
            if self.workers[number].told[0] < generation and (is_lost or not known):
                turn = 0 if known is None else known.round + 1
                place = number % self.num_places
                self.say(records.WorkerCame(generation, number, turn, place))

    def break_something(self, chosen) -> None:
        if self.rng.random() >= self.fault / 2:
            return
        worker = self.workers[self.rng.choice(chosen)]
        worker.hangs = self.rng.choice((5, 60))
        if self.rng.random() < 0.5 and not worker.dead:
            worker.dead, worker.generating = True, False
            told = self.queue.generation, worker.number, "bug", worker.told[1]
            self.say(records.WorkerFailed(*told))

    def say(self, event) -> None:
        if event is not None:
            self.network.send(self.now, event)

    def deliver(self, message) -> None:
        match message:
            case records.Generate():
                self.workers[message.worker].hear(message)
            case records.Train() | records.Stop():
                self.say(self.trainer.hear(message))
            case records.ReturnRequests(generation, worker, turn):
                self.queue.give_back(generation, worker, turn)
                self.say(records.RequestsReturned(generation, worker, turn))
            case records.EndRollout(generation) | records.Abort(generation, _):
                if generation == self.queue.generation:
                    self.over.add(message)
            case _:
                self.give(message)

    def give(self, event) -> None:
        before, running = self.state, self.state.training
        if isinstance(event, records.TrainingFailed) and running is not None:
            asked = event.training != running.number or running.stop_asked_s is not None
            self.num_failures += not asked
        self.state, commands = self.machine.handle(before, event, self.now, self.cfg)
        check_state(self.state)
        check_change(before, self.state)
        for command in commands:
            self.check_command(before, command)
            self.network.send(self.now, command)
        if self.state.given_up:
            self.given_up.add(self.state.given_up)

    def check_command(self, before: records.State, command) -> None:
        lost = self.state.which(records.Activity.LOST)
        if isinstance(command, records.Train):
            assert self.num_failures <= self.cfg.max_restarts, "too many restarts"
            current = self.trainer.current
            other = current is not None and current.training != command.training
            assert not (other and self.trainer.step_left), "two trainings at a time"
            busy = self.state.which(records.Activity.BUSY)
            assert busy, "a training begins though nobody generates"
            assert not set(command.workers) & {*busy, *lost}
        training = before.training
        new = training is not None and training.stop_asked_s is None
        if isinstance(command, records.Stop) and new:
            early = before.rolling and self.state.which(records.Activity.BUSY)
            broken = set(training.members) & set(lost)
            broken = broken or self.state.asked is not None
            assert not early or broken, "a training ends before the last worker"

    def trainer_tick(self) -> None:
        trainer = self.trainer
        answer = None
        if trainer.current is not None and self.rng.random() >= self.loss:
            answer = self.machine.may_train(self.state, trainer.current.training)
        was = trainer.step_left
        self.say(trainer.tick(answer))
        if trainer.step_left and trainer.current is not None:
            self.num_steps += not was
            if not was and answer:
                busy = self.state.which(records.Activity.BUSY)
                assert busy, "a step begins after the last worker"
            if trainer.current.training not in self.given_up:
                for member in trainer.current.workers:
                    assert not self.workers[member].generating, "it does both"

    def check_end(self, generation: int, chosen) -> None:
        state, message = self.state, self.over.pop()
        assert not state.rolling and state.generation == generation
        check_accounts(self.machine, state, chosen)
        if isinstance(message, records.Abort):
            assert "no worker is left" in message.reason
            assert len(state.which(records.Activity.LOST)) == len(state.workers)
            return
        assert self.queue.done == self.queue.all, "a request is lost"
        assert state.training is None, "a training does not end"
        late = {worker.number for worker in state.workers} - set(chosen)
        self.num_joined += len(late)
        for worker in {*chosen, *late}:
            lost = state.worker(worker).activity == records.Activity.LOST
            assert lost or not self.workers[worker].generating
        current = self.trainer.current
        if current is not None and self.trainer.step_left:
            assert current.training in self.given_up, "a step outlives the rollout"


def check_state(state: records.State) -> None:
    """Check what must hold between any two events."""
    numbers = [w.number for w in state.workers]
    assert len(set(numbers)) == len(numbers)
    training = state.training
    members = () if training is None else training.members
    for worker in state.workers if state.rolling else ():
        if worker.activity == records.Activity.TRAINING:
            joined = dict(training.joined)[worker.number]
            assert worker.place == training.place, "its process does not train"
            assert joined <= training.running, "it trains before the trainer says so"
        if worker.activity == records.Activity.BUSY:
            assert worker.number not in members, "a busy worker is to train"
    if state.rolling:
        if not state.which(records.Activity.BUSY) and training is not None:
            assert training.stop_asked_s is not None, "it outlives the last worker"


def check_change(before: records.State, after: records.State) -> None:
    """Check what one event may do to a worker."""
    if not before.rolling or before.generation != after.generation:
        return
    going_on = before.training is not None and after.training is not None
    going_on = going_on and before.training.number == after.training.number
    for now in after.workers:
        was = before.worker(now.number)
        if was is None:
            come = now.activity, now.round, now.since_s
            assert come == (records.Activity.BUSY, 0, after.now_s), "it was there"
            continue
        change = was.activity, now.activity
        if was.activity == records.Activity.LOST and now != was:
            assert now.activity == records.Activity.BUSY, "the lost wait or train"
            assert now.round == was.round + 1, "the lost come back, not anew"
            assert now.number not in before.unreturned, "it would lose its requests"
        if was.activity == records.Activity.TRAINING and going_on:
            stays = records.Activity.TRAINING, records.Activity.LOST
            assert now.activity in stays, "it leaves a training that goes on"
        assert change != (records.Activity.BUSY, records.Activity.TRAINING)


def check_accounts(machine, state: records.State, chosen) -> None:
    """Check that each worker's seconds are those of the rollout, without gaps."""
    late = {worker.number for worker in state.workers}.difference(chosen)
    starts = dict.fromkeys(chosen, state.began_s)
    for worker in late:
        own = [i.start_s for i in machine.timeline(state) if i.worker == worker]
        starts[worker] = min(own, default=state.ended_s)
    for worker, at_s in starts.items():
        for interval in machine.timeline(state):
            if interval.worker == worker:
                assert interval.start_s == at_s, "a gap in the timeline"
                at_s = interval.stop_s
        assert at_s == state.ended_s, "seconds do not add up"
    found = machine.sums(machine.timeline(state))
    present_s = sum(state.ended_s - start_s for start_s in starts.values()) - sum(
        i.stop_s - i.start_s
        for i in machine.timeline(state)
        if i.activity == records.Activity.LOST
    )
    assert 0 <= found["workers/trained_s"] <= found["workers/idle_s"] <= present_s
