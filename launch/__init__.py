"""Jobs on clusters: one description, thin backends on engines that exist.

BACKENDS is the list: a file with a Backend, and a line here.
"""

from launch.base import Backend
from launch.gcloud import GCLOUD
from launch.gke import GKE
from launch.skypilot import SKYPILOT

BACKENDS: dict[str, Backend] = {
    "gke": GKE,
    "gcloud": GCLOUD,
    "skypilot": SKYPILOT,
}
