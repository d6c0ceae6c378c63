"""Run several processes as one: ranks, and how they divide a step, a base or its layers."""
