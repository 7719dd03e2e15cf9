-- Beside `mlflow`, which the image makes: each has a schema of its own kind.
CREATE DATABASE jobs;
CREATE DATABASE studies;
