"""Objectives, advantages and estimates: plain functions of tensors."""
