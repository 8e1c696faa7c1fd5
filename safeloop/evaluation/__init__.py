"""Evaluation: metrics over a whole data set, after which nothing that training sees has changed."""

from safeloop.evaluation.modes import enter_training as enter_training
from safeloop.evaluation.preserved import preserved as preserved
from safeloop.evaluation.run import evaluate as evaluate
from safeloop.evaluation.run import needs_grad as needs_grad
from safeloop.evaluation.run import wants_grad as wants_grad
