"""The settings of the tests of jobs, with all that they are made of."""

from tests.jobs.conftest import *  # noqa: F403 - one left out is missed only where a test asks for it
