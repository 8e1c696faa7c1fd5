"""The doctor: reads the folder of a run and ranks what looks wrong in it. Pure rules over plain numbers, no torch."""

from safeloop.doctor.diagnosis import Diagnosis, diagnose
from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run, read_run

__all__ = ["Diagnosis", "Finding", "Run", "diagnose", "read_run"]
