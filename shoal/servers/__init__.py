"""The parameter server: who holds the parameters, when they change, and how they travel.

core          one server: its parameters, its optimizers, its workers; waits for nobody
update_rules  when a push changes the parameters: in synchronous rounds, or on arrival
merge         one gradient of many: mean, trimmed mean, median
delayed       delayed Nesterov momentum
ranges        the model cut into one range for each server
host          a server behind a lock, with a thread for each worker of another process
stubs         how a worker calls one server: within its process, or over a connection
client        all servers as one worker sees them
connections   headers over a pair of processes; tensors too, or through shared memory
push_format   gradients as they are, or encoded
messages      the headers
"""
