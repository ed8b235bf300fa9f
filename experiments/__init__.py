"""What was measured, and how to measure it again: each name in here is a command, too.

`train` trains one arm or a sweep of them, and `kill_test` shows that killing a sweep costs nothing.
`report` compares finished runs; `study`, `gauntlet` and `overhead` ask a question each, with the
answers committed, and `claims` checks what the README says. Imports go one way: to `train` and
`report` from the others, and from `report` to `train`.
"""

__all__: list[str] = []
