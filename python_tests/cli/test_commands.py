"""Every command has its function."""

from r2f_ext.cli import commands


def test_every_command_has_its_function():
    assert all(callable(commands.load(name)) for name in commands.COMMANDS)
