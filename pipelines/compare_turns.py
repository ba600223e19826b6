"""Whose turn it is in a comparison: the generations of a group of arms, and which are missing."""

from collections.abc import Sequence
from dataclasses import replace

from accel.pipelines.compare_arms import ArmSpec
from accel.pipelines.compare_book import Book, Job
from accel.pipelines.compare_settings import CompareSettings


def turns_of(settings: CompareSettings, prompts: int, group: int) -> list[Job]:
    """Every prompt once, then the timing prompts again; arms take turns in being first."""
    arms = settings.groups[group]
    jobs = []
    for number in range(settings.rounds):
        count = min(prompts, settings.timing_prompts) if number else prompts
        for prompt in range(count):
            first = (number + prompt) % len(arms)
            for arm in arms[first:] + arms[:first]:
                beside = group if arm in settings.dense_arms else 0
                jobs.append(Job(arm, prompt, number, beside))
    return jobs


def missing_of(book: Book, jobs: Sequence[Job], dense: Sequence[ArmSpec]) -> list[Job]:
    """What is missing of a group's turns. Dense is timed in every turn that an arm has yet to take:
    if it was in an earlier sitting, then once more.
    """
    missing = {job for job in jobs if book.result(job) is None}
    turns = {(job.prompt, job.round) for job in missing if job.arm not in dense}
    todo = []
    for job in jobs:
        if job.arm in dense and (job.prompt, job.round) in turns:
            todo.append(replace(job, sample=len(book.samples(job))))
        elif job in missing and not (job.arm in dense and job.beside):
            todo.append(job)
    return todo


def is_of_use(
    job: Job, todo: Sequence[Job], alive: Sequence[ArmSpec], dense: Sequence[ArmSpec]
) -> bool:
    """Whether there still is an arm beside which dense, which has its video, is to be timed.

    alive: the arms that have not failed.
    """
    if job.arm not in dense or not (job.beside or job.sample):
        return True
    turn = (job.prompt, job.round)
    beside = {other.arm for other in todo if (other.prompt, other.round) == turn}
    return any(arm in alive for arm in beside - set(dense))
