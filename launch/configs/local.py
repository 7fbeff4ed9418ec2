"""Two local processes with one CPU device each."""

from launch import settings


def get_config():
    return settings.local()
