"""The parameter server: who holds the parameters, who may change them when, and how they travel.

core        one server: its parameters, its optimizers, its workers; waits for nobody
policies    when a push changes the parameters: synchronous rounds, or on arrival
merge       one gradient of many: mean, trimmed mean, median
delayed     delayed Nesterov momentum
ranges      the model cut into one range for each server
host        a server behind a lock, with a thread for each worker of another process
links       a worker's way to a server: within its process, or over a line
lines       headers over a pair of processes, tensors too or through shared memory
parcels     gradients as they are, or encoded
messages    the headers
worker      all servers as one worker sees them
simulator   workers and servers in one process, with delays from a script
"""
