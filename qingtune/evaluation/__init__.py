"""Evaluation: metrics of answers, their confidence intervals, and reports."""
