"""A gauntlet's results on one page."""

from experiments.gauntlet.page.page import command_line, render, write_page

__all__ = ["command_line", "render", "write_page"]
