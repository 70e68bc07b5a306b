"""Bugs that were not made: exact replacements in the shipped code, each of which the simulation must find."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """In `path`, `old` stands exactly once and becomes `new`."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """One bug."""

    name: str
    edits: tuple[Edit, ...]


def _bug(name: str, path: str, old: str, new: str) -> Mutation:
    return Mutation(name, (Edit(path, old, new),))


MUTATIONS = (
    _bug(
        "skip the digest check",
        "pdserve/handoff/transports/grpc_stream.py",
        "matched = await self._copy(segment, block_ids) == segment.digest",
        "matched = await self._copy(segment, block_ids) >= 0",
    ),
    _bug(
        "free before the step boundary",
        "pdserve/handoff/ledger.py",
        "            self.released = True\n            if not self._num_users:\n",
        "            self.released = True\n            if self._num_users >= 0:\n",
    ),
    _bug(
        "free while a copy writes",
        "pdserve/handoff/receiving.py",
        "                with self._hold.in_use():\n",
        "                with contextlib.nullcontext():\n",
    ),
    _bug(
        "forget a cancel",
        "decode_worker/loop.py",
        "        request = self._requests.get(sink, number)\n        if request is not None:\n",
        "        request = self._requests.get(sink, number)\n"
        "        if request is not None and request.fetch is None:\n",
    ),
    _bug(
        "a broken Session leaves its requests running",
        "decode_worker/streams.py",
        "        self._submissions.drop(session)\n",
        "",
    ),
    _bug(
        "accept a stale attempt: submissions outlive their Session",
        "router/links.py",
        """        for number in list(self._submissions):
            self._finish(number, SubmissionEnd(error, lost_worker=True))
""",
        "",
    ),
    _bug(
        "accept a stale incarnation at the source",
        "pdserve/handoff/sending.py",
        "        if opened.source_incarnation != self._incarnation:\n",
        "        if opened.source_incarnation == 0:\n",
    ),
    Mutation(
        "accept a stale incarnation between router and worker",
        (
            Edit(
                "router/links.py",
                "        if hello.incarnation != self._view.member.incarnation:\n",
                "        if hello.incarnation == 0:\n",
            ),
            Edit(
                "router/links.py",
                "case Report(incarnation) if incarnation != self._view.member.incarnation:",
                "case Report(incarnation) if incarnation == 0:",
            ),
            Edit(
                "router/links.py",
                "        if answer.worker_incarnation != self._view.member.incarnation:\n",
                "        if answer.worker_incarnation == 0:\n",
            ),
            Edit(
                "decode_worker/streams.py",
                "        if opened.worker_incarnation != self._incarnation:\n",
                "        if opened.worker_incarnation == 0:\n",
            ),
        ),
    ),
    Mutation(
        "let a half-close count as an End",
        (
            Edit(
                "pdserve/rpc/stream.py",
                "        message = await self._inbox.get()\n",
                "        try:\n"
                "            message = await self._inbox.get()\n"
                "        except StreamBroken:\n"
                "            message = End()\n",
            ),
            Edit(
                "pdserve/handoff/receiving.py",
                """                case End():
                    raise ProtocolViolation("the source ended the call before every segment was verified")
""",
                """                case End():
                    self._proven.set()
                    return
""",
            ),
        ),
    ),
    _bug(
        "emit a token twice after a recovery",
        "router/journey.py",
        "        if num_seen == 0:\n            return event\n",
        "        if num_seen >= 0:\n            return event\n",
    ),
    _bug(
        "go on after a gap in the tokens",
        "router/journey.py",
        "        if num_seen < 0:\n",
        "        if num_seen < 0:\n            return event\n        if num_seen < -1:\n",
    ),
    _bug(
        "forget the known output of a recovery",
        "router/journey.py",
        "known_output_tokens=bytes(progress.output),",
        'known_output_tokens=b"",',
    ),
    _bug(
        "resample a known token",
        "decode_worker/request.py",
        "        return self.num_to_prefill == self.num_prompt + self.num_known_output\n",
        "        return True\n",
    ),
    _bug(
        "forget to release on Busy",
        "pdserve/handoff/prefill_job.py",
        "        self.resting = True\n        self.hold.release()\n",
        "        self.resting = True\n",
    ),
    _bug(
        "the source forgets to release at the end of a call",
        "pdserve/handoff/sending.py",
        "            if job.state is not JobState.QUEUED:\n                job.hold.release()\n",
        "",
    ),
    _bug(
        "compute before the decode worker has reserved",
        "prefill_worker/loop.py",
        "        ready = self._source.in_state(JobState.READY)\n        progress",
        "        ready = self._source.in_state(JobState.READY) + self._source.in_state(JobState.STARTING)\n"
        "        progress",
    ),
    _bug(
        "publish before proven",
        "pdserve/handoff/receiving.py",
        """            ok = await copy.verified
            self._note_copy(copy, ok)
            await stream.send(Ack(copy.segment.index, ok))
            if ok:
                self._prove(copy.segment)
                self._conclude()
            else:
""",
        """            self._prove(copy.segment)
            ok = await copy.verified
            self._note_copy(copy, ok)
            await stream.send(Ack(copy.segment.index, ok))
            if ok:
                self._conclude()
            else:
                self._proof._under_way[copy.segment.index] = copy.segment
""",
    ),
    _bug(
        "a block counts as whole with some of its layers",
        "pdserve/handoff/proof.py",
        "while not self.is_whole and self._verified[self._num_proven] == self._all_layers:",
        "while not self.is_whole and self._verified[self._num_proven]:",
    ),
    _bug(
        "sealed before all is verified",
        "pdserve/handoff/receiving.py",
        """        if sealed is None or self._proof.num_segments < sealed.num_segments:
            return
        if self._proof.digest != sealed.digest:
            raise TransferCorrupt("the sealed digest does not match the segments")
        if not self._proof.is_whole and not self._listener.over():
            raise ProtocolViolation("the source sealed fewer blocks than the prompt has")
""",
        """        if sealed is None:
            return
""",
    ),
    _bug(
        "the wrong blocks for a resend",
        "pdserve/handoff/sending.py",
        "            self._job.hold.block_ids[shipment.first_block : last],\n",
        "            self._job.hold.block_ids[shipment.first_block : last]\n"
        "            if shipment.index not in self._digests\n"
        "            else self._job.hold.block_ids[: shipment.num_blocks],\n",
    ),
    _bug(
        "the window ignores acknowledgements",
        "pdserve/handoff/shipping.py",
        "        if ok:\n            self._unacknowledged.discard(index)\n",
        "        if ok:\n            return\n",
    ),
    _bug(
        "drop the clearing of bookings",
        "router/journey.py",
        "            booking.clear()\n",
        "",
    ),
    _bug(
        "nobody compares what a worker holds with what is wanted",
        "router/links.py",
        "                    self._compare(last_submit, set(numbers))\n",
        "                    continue\n",
    ),
)
