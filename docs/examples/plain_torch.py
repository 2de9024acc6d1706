"""A plain PyTorch loop. Run it with: torchrun --standalone --nproc_per_node=2 plain_torch.py"""

import torch
import torch.distributed as dist

from swanlab_ray.observer import connect


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with connect(project="demo", mode="local") as observer:  # the same call on every rank
        observer.config(learning_rate=0.1, batch_size=16)
        for step in range(20):
            inputs = torch.randn(16, 8)
            loss = ((model(inputs) - inputs.sum(dim=1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            observer.log({"loss": loss}, step=step)


if __name__ == "__main__":
    main()
