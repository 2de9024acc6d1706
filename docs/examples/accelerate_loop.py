"""A loop with Accelerate. Run it with: torchrun --standalone --nproc_per_node=2 accelerate_loop.py"""

import torch
from accelerate import Accelerator

from swanlab_ray.observer import ObserverSettings, ObserverTracker


def main() -> None:
    tracker = ObserverTracker(ObserverSettings(project="demo", mode="local"))
    accelerator = Accelerator(log_with=tracker, cpu=True)
    accelerator.init_trackers("demo", config={"learning_rate": 0.1})
    model = torch.nn.Linear(8, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    torch.manual_seed(accelerator.process_index)
    for step in range(20):
        inputs = torch.randn(16, 8)
        loss = ((model(inputs) - inputs.sum(dim=1, keepdim=True)) ** 2).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        tracker.observer.log({"loss": loss}, step=step)  # every rank; accelerator.log is the main process only
        accelerator.log({"lr": optimizer.param_groups[0]["lr"]}, step=step)

    # A DDP model that is let go of after its process group may hang in PyTorch 2.13 with Gloo.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
