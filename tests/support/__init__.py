"""Fakes, small models, recorded files and starters of runs that several tests share."""
