"""Measurements that decide: schedules, merged operators, bets, tuned kernels."""
