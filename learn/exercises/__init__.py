"""Eight functions of the project to write oneself: python -m learn.exercises"""
