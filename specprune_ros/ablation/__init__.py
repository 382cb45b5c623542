"""Ablation studies of SpecPrune-VLA on a task: the paper's, and those of our own readings.

`studies` says what is varied, `task` what the policies are put through, `panel` what is measured
of one answer, `runner` runs, `summary` condenses, `output` writes.
"""
