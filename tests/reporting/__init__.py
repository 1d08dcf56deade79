"""Tests of `care_train.reporting`."""
